"""FLUX blocks whose attention and MLP run inside TensorRT plans, in the shape of ComfyUI's own.

Only the modulation Linears stay PyTorch modules. Every other weight of ComfyUI's block is replaced
by an `EngineWeight`: LoRA and merge nodes find its name and shape, and get a clear error when
they touch it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, ModulationOut, SingleStreamBlock
from torch import Tensor, nn

from .attention_masks import AttentionMasks
from .errors import EngineWeightError, UnsupportedByEngineError
from .modulation_table import TabledModulation
from .rotary import RotaryTables

# ComfyUI's own Linear has no parameters before its weights are loaded when DynamicVRAM is on (0.30,
# ``comfy.ops``), and names and shapes are all that is wanted of these.
_PARAMETERS_AT_ONCE = nn


class BlockEngine(Protocol):
    """What a block needs of an engine."""

    def run(self, block: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]: ...


class EngineWeight(nn.Module):
    """Stands where ComfyUI's block has a Linear or RMSNorm whose weights are inside the plan."""

    def __init__(self, name: str, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.name = name
        self.shapes = dict(shapes)

    @property
    def weight(self) -> Tensor:
        # Not an AttributeError: `hasattr` and `getattr` with a default must not hide it.
        raise EngineWeightError([f"{self.name}.weight"], "A node reads")

    @property
    def bias(self) -> Tensor | None:
        if "bias" not in self.shapes:
            return None
        raise EngineWeightError([f"{self.name}.bias"], "A node reads")

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        for name, shape in self.shapes.items():
            destination[prefix + name] = torch.empty(shape, device="meta")


def replace_weights(block: nn.Module, name: str, keep: tuple[str, ...]) -> None:
    """Put an `EngineWeight` in the place of every module of `block` that owns parameters.

    Args:
        block: A block of ComfyUI's, built on the meta device.
        name: The block's name, for example ``double_blocks.0``.
        keep: Children that stay as they are.
    """
    owners = [
        (path, module)
        for path, module in block.named_modules()
        if path.split(".")[0] not in keep and list(module.parameters(recurse=False))
    ]
    for path, module in owners:
        shapes = {key: p.shape for key, p in module.named_parameters(recurse=False)}
        parent, _, leaf = path.rpartition(".")
        setattr(block.get_submodule(parent), leaf, EngineWeight(f"{name}.{path}", shapes))


class EngineDoubleBlock(DoubleStreamBlock):
    """A double block: `img` and `txt` streams, joint attention, all inside one plan."""

    def __init__(
        self,
        name: str,
        engine: BlockEngine,
        rotary: RotaryTables,
        masks: AttentionMasks,
        sizes: Mapping[str, Any],
        weights: Mapping[str, Any],
    ) -> None:
        super().__init__(**sizes, device="meta", operations=_PARAMETERS_AT_ONCE)
        replace_weights(self, name, keep=("img_mod", "txt_mod"))
        if self.modulation:
            self.img_mod = TabledModulation(sizes["hidden_size"], double=True, **weights)
            self.txt_mod = TabledModulation(sizes["hidden_size"], double=True, **weights)
        self.name, self.engine, self.rotary, self.masks = name, engine, rotary, masks

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Any,
        pe: Tensor,
        attn_mask: Tensor | None = None,
        modulation_dims_img: Any = None,
        modulation_dims_txt: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - ComfyUI's signature; only read
    ) -> tuple[Tensor, Tensor]:
        _refuse_attention_changes(self.name, transformer_options)
        _refuse_modulation_dims(self.name, modulation_dims_img, modulation_dims_txt)
        cos, sin = self.rotary(pe)
        inputs = {"img": img, "txt": txt, "cos": cos, "sin": sin}
        inputs |= self.masks.inputs(attn_mask, img, cos.shape[1])
        # FLUX.2 modulates all double blocks alike: ComfyUI passes the vectors in the place of vec.
        mods = (self.img_mod(vec), self.txt_mod(vec)) if self.modulation else vec
        for stream, parts in zip(("img", "txt"), mods, strict=True):
            for index, part in enumerate(parts, start=1):
                inputs |= _modulation_inputs(f"{stream}_mod{index}", part)
        outputs = _run(self.engine, self.name, inputs)
        return outputs["img_out"], _finite(outputs["txt_out"])


class EngineSingleBlock(SingleStreamBlock):
    """A single block: text and image tokens in one stream, all inside one plan."""

    modulation: TabledModulation | None

    def __init__(
        self,
        name: str,
        engine: BlockEngine,
        rotary: RotaryTables,
        masks: AttentionMasks,
        sizes: Mapping[str, Any],
        weights: Mapping[str, Any],
    ) -> None:
        super().__init__(**sizes, device="meta", operations=_PARAMETERS_AT_ONCE)
        replace_weights(self, name, keep=("modulation",))
        if self.modulation is not None:
            self.modulation = TabledModulation(sizes["hidden_size"], double=False, **weights)
        self.name, self.engine, self.rotary, self.masks = name, engine, rotary, masks

    def forward(
        self,
        x: Tensor,
        vec: Any,
        pe: Tensor,
        attn_mask: Tensor | None = None,
        modulation_dims: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - ComfyUI's signature; only read
    ) -> Tensor:
        _refuse_attention_changes(self.name, transformer_options)
        _refuse_modulation_dims(self.name, modulation_dims)
        cos, sin = self.rotary(pe)
        part = vec if self.modulation is None else self.modulation(vec)[0]
        inputs = {"x": x, "cos": cos, "sin": sin, **_modulation_inputs("mod", part)}
        inputs |= self.masks.inputs(attn_mask, x, cos.shape[1])
        outputs = _run(self.engine, self.name, inputs)
        return _finite(outputs["x_out"])


# A plan is one opaque call: tracing into it would only break torch.compile's graph halfway.
@torch.compiler.disable
def _run(engine: BlockEngine, block: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return engine.run(block, inputs)


def _modulation_inputs(prefix: str, part: ModulationOut) -> dict[str, Tensor]:
    return {
        f"{prefix}_shift": part.shift,
        f"{prefix}_scale": part.scale,
        f"{prefix}_gate": part.gate,
    }


def _finite(x: Tensor) -> Tensor:
    # fp16 overflows in FLUX's text stream; ComfyUI 0.30 clips it at the same two places.
    if x.dtype != torch.float16:
        return x
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504)


def _refuse_attention_changes(block: str, transformer_options: Mapping[str, Any]) -> None:
    if "optimized_attention_override" in transformer_options:
        raise UnsupportedByEngineError(
            "A replaced attention function", block, "Remove the node that overrides attention"
        )
    patches = transformer_options.get("patches", {})
    for kind in ("attn1_patch", "attn1_output_patch"):
        if patches.get(kind):
            raise UnsupportedByEngineError(
                f"A patch of type '{kind}'", block, "Remove the node that patches attention"
            )


def _refuse_modulation_dims(block: str, *modulation_dims: Any) -> None:
    if any(dims is not None for dims in modulation_dims):
        raise UnsupportedByEngineError(
            "The reference latent method 'index_timestep_zero'",
            block,
            "Choose 'offset', 'index' or 'uxo/uno' in 'Edit Model Reference Method'",
        )
