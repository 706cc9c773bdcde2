"""Nodes for the tests of whole graphs, loaded into the server beside the pack.

`TestLoadEmulatedFlux` is the yardstick: ComfyUI's stock FLUX whose block Linears compute what the
stored quantization stands for. The others set what no core node sets.
"""

from __future__ import annotations

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
    """Sets what *Apply Style Model* with a strength sets."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {"required": {"conditioning": ("CONDITIONING",)}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "mask"
    CATEGORY = "tests"

    def mask(self, conditioning: list[Any]) -> tuple[list[Any]]:
        tokens = conditioning[0][0].shape[1] + 16
        mask = torch.zeros(1, tokens, tokens)
        changes = {"attention_mask": mask, "attention_mask_img_shape": (4, 4)}
        return ([[context, {**options, **changes}] for context, options in conditioning],)


NODE_CLASS_MAPPINGS = {
    "TestAttentionMask": TestAttentionMask,
    "TestLoadEmulatedFlux": TestLoadEmulatedFlux,
    "TestTransformerOption": TestTransformerOption,
}
