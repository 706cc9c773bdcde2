"""Nodes for the tests of whole graphs, loaded into the server beside the pack.

`TestLoadEmulatedFlux` is the yardstick: ComfyUI's stock FLUX whose block Linears compute what the
stored quantization stands for. The others set what no core node sets.
"""

from __future__ import annotations

import math
from typing import Any

import torch


class TestLoadEmulatedFlux:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {"checkpoint": ("STRING", {"default": ""})}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "tests"

    def load(self, checkpoint: str) -> tuple[Any]:
        from .emulated_flux import load_emulated_flux

        return (load_emulated_flux(checkpoint),)


class TestTransformerOption:
    """Sets an option or patch that reaches into attention."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        kinds = ["attn1_patch", "attn1_output_patch", "override", "keep_first_block"]
        return {"required": {"model": ("MODEL",), "kind": (kinds,)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "tests"

    def patch(self, model: Any, kind: str) -> tuple[Any]:
        patched = model.clone()
        if kind == "attn1_patch":
            patched.set_model_attn1_patch(lambda q, k, v, **_: {"q": q, "k": k, "v": v})
        elif kind == "attn1_output_patch":
            patched.set_model_attn1_output_patch(lambda out, _options: out)
        elif kind == "override":
            options = patched.model_options["transformer_options"]
            options["optimized_attention_override"] = lambda call, *args, **kw: call(*args, **kw)
        else:
            _keep_first_block(patched)
        return (patched,)


def _keep_first_block(model: Any) -> None:
    """Reuse what the first block added in the step before: the principle of block caches."""
    kept: dict[str, torch.Tensor] = {}

    def replace(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        if "added" in kept and kept["added"].shape == args["img"].shape and kept["use"]:
            kept["use"] = False
            return {"img": args["img"] + kept["added"], "txt": args["txt"]}
        before = args["img"].clone()  # stock blocks add in place
        result = extra["original_block"](args)
        kept["added"], kept["use"] = result["img"] - before, True
        return result

    model.set_model_patch_replace(replace, "dit", "double_block", 0)


class TestAttentionMask:
    """Sets attention masks as *Apply Style Model* and nodes for regional prompts do."""

    KINDS = ("style strength 0.3", "style strength 0.3, made for a larger picture", "regions")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {"conditioning": ("CONDITIONING",), "kind": (cls.KINDS,)}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "mask"
    CATEGORY = "tests"

    def mask(self, conditioning: list[Any], kind: str) -> tuple[list[Any]]:
        text = conditioning[0][0].shape[1]
        # the small model's pictures have 4 x 4 tokens
        side = 8 if kind.endswith("larger picture") else 4
        mask = regions(text, side) if kind == "regions" else style(text, side)
        changes = {"attention_mask": mask, "attention_mask_img_shape": (side, side)}
        return ([[context, {**options, **changes}] for context, options in conditioning],)


def style(text: int, side: int) -> torch.Tensor:
    """Let the picture look less at the second half of the text, where Redux's tokens would be."""
    mask = torch.zeros(1, text + side * side, text + side * side)
    mask[:, text:, text // 2 : text] = math.log(0.3)
    return mask


def regions(text: int, side: int) -> torch.Tensor:
    """Let the left half of the picture see the first half of the text only."""
    tokens = text + side * side
    # numbers: ComfyUI turns booleans into 1 and 0 on their way to the model
    mask = torch.zeros(1, tokens, tokens)
    left = text + torch.arange(side * side).view(side, side)[:, : side // 2].flatten()
    mask[:, left, text // 2 : text] = -torch.inf
    return mask


class TestContextLength:
    """Repeats a text's tokens up to a number, as Redux makes long contexts."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {"conditioning": ("CONDITIONING",), "tokens": ("INT", {"default": 1})}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "repeat"
    CATEGORY = "tests"

    def repeat(self, conditioning: list[Any], tokens: int) -> tuple[list[Any]]:
        context, options = conditioning[0]
        times = math.ceil(tokens / context.shape[1])
        return ([[context.repeat(1, times, 1)[:, :tokens], options]],)


NODE_CLASS_MAPPINGS = {
    "TestAttentionMask": TestAttentionMask,
    "TestContextLength": TestContextLength,
    "TestLoadEmulatedFlux": TestLoadEmulatedFlux,
    "TestTransformerOption": TestTransformerOption,
}
