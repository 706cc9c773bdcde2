"""Storage of the modulation Linears: outside of plans, run by ComfyUI in its own quantized layouts.

FLUX.1-dev holds 3.2 of its 11.9 billion weights here. They act on one vector per image and step, so
what counts is their size, not their speed.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .native_nvfp4 import native_marker, native_shapes, to_native
from .nvfp4 import E4M3_MAX, quantize_weight
from .recipe import Format

_WEIGHT = re.compile(
    r"(double_blocks\.\d+\.(img|txt)_mod|single_blocks\.\d+\.modulation"
    r"|double_stream_modulation_(img|txt)|single_stream_modulation)\.lin\.weight"
)
_COMFY_FORMATS: dict[Format, str] = {"fp8": "float8_e4m3fn", "nvfp4": "nvfp4"}


def is_modulation_weight(name: str) -> bool:
    """Tell whether a tensor is the weight of a modulation Linear."""
    return _WEIGHT.fullmatch(name) is not None


def modulation_layout(
    name: str, shape: tuple[int, ...], storage: Format
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of the tensors that ``stored_modulation`` makes of a weight."""
    linear = name.removesuffix(".weight")
    marker = {f"{linear}.comfy_quant": (torch.uint8, tuple(_marker(storage).shape))}
    if storage == "fp8":
        scale = {f"{linear}.weight_scale": (torch.float32, ())}
        return {name: (torch.float8_e4m3fn, shape), **scale, **marker}
    packed, scales = native_shapes(*shape)
    return {
        name: (torch.uint8, packed),
        f"{linear}.weight_scale": (torch.float8_e4m3fn, scales),
        f"{linear}.weight_scale_2": (torch.float32, ()),
        **marker,
    }


def stored_modulation(name: str, weight: Tensor, storage: Format) -> dict[str, Tensor]:
    """Quantize a modulation weight as ComfyUI 0.30's ``ops.mixed_precision_ops`` reads it.

    Args:
        name: Full name of the weight.
        weight: ``[N, K]``.
        storage: ``fp8`` (one scale, amax / 448) or ``nvfp4``.

    Returns:
        Tensors by full name.

    Raises:
        NotFiniteError: The weight holds NaN or infinity.
    """
    linear = name.removesuffix(".weight")
    marker = {f"{linear}.comfy_quant": _marker(storage)}
    if storage == "fp8":
        scale = weight.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny) / E4M3_MAX
        values = (weight.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return {name: values, f"{linear}.weight_scale": scale, **marker}
    native = to_native(quantize_weight(weight, linear))
    return {
        name: native.packed,
        f"{linear}.weight_scale": native.block_scale,
        f"{linear}.weight_scale_2": native.global_scale,
        **marker,
    }


def _marker(storage: Format) -> Tensor:
    # the input is one vector: rounding it would cost precision and win no time
    return native_marker(_COMFY_FORMATS[storage], full_precision=True)
