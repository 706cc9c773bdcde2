"""The small model as other software quantizes it, by that software's own code."""

from __future__ import annotations

import comfy_kitchen
import torch
from flux_fp4.quant.emulation import EmulatedLinear
from flux_fp4.quant.flux.config import block_linears
from flux_fp4.quant.flux.model import Flux
from flux_fp4.quant.native_nvfp4 import NativeNVFP4Weight, from_native
from flux_fp4.quant.nvfp4 import E2M1_MAX, E4M3_MAX, fake_quantize_activation
from flux_fp4.quant.sources.source import FluxSource
from torch import Tensor

from .sampling import original_model


def comfy_kitchen_model(source: FluxSource) -> tuple[Flux, int]:
    """Quantize as ComfyUI 0.30 does when it makes NVFP4 of a weight: comfy_kitchen's rounding.

    Returns:
        The model, attention in full precision, and the bytes of its quantized weights.
    """
    model, size = original_model(source), 0
    for block in source.config.block_names:
        for name in (f"{block}.{linear}" for linear in block_linears(block)):
            linear = model.get_submodule(name)
            stored = _native(linear.weight.detach().bfloat16())  # type: ignore[operator]
            weight = from_native(stored, len(linear.weight)).dequantize()  # type: ignore[arg-type]
            model.set_submodule(name, EmulatedLinear(weight, linear.bias, _by_own_range))  # type: ignore[arg-type]
            size += sum(t.numel() * t.element_size() for t in (stored.packed, stored.block_scale))
    return model, size


def _native(weight: Tensor) -> NativeNVFP4Weight:
    scale = weight.abs().amax().float() / (E2M1_MAX * E4M3_MAX)
    packed, block_scale = comfy_kitchen.quantize_nvfp4(weight, scale, pad_16x=True)
    return NativeNVFP4Weight(packed, block_scale, scale)


def _by_own_range(x: Tensor) -> Tensor:
    """Round an input by its own largest value, as ``TensorCoreNVFP4Layout`` does at run time."""
    amax = x.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
    return fake_quantize_activation(x, amax / (E2M1_MAX * E4M3_MAX))
