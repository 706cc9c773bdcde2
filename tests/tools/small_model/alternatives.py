"""The small model as other software quantizes it, by that software's own code."""

from __future__ import annotations

import copy

import comfy_kitchen
import modelopt.torch.quantization as mtq
import torch
from flux_fp4.quant.calibration import CalibrationSet
from flux_fp4.quant.emulation import EmulatedLinear
from flux_fp4.quant.flux.config import block_linears
from flux_fp4.quant.flux.model import Flux, image_ids, patchify
from flux_fp4.quant.native_nvfp4 import NativeNVFP4Weight, from_native
from flux_fp4.quant.nvfp4 import E2M1_MAX, E4M3_MAX, fake_quantize_activation
from flux_fp4.quant.sources.source import FluxSource
from modelopt.torch.quantization import tensor_quant
from torch import Tensor

from .sampling import AT_ONCE, original_model


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


def modelopt_model(source: FluxSource, config: str, samples: CalibrationSet) -> Flux:
    """Quantize with one of ModelOpt 0.47's configurations as it comes, by ``mtq.quantize``.

    ModelOpt fake-quantizes NVFP4 on GPUs only; here it is told to round as they do.

    Args:
        source: The original.
        config: Name of the configuration, such as ``NVFP4_DEFAULT_CFG``.
        samples: To calibrate with.

    Returns:
        The model with ModelOpt's modules for the Linears of blocks. The rest is as it was, as in
        NVIDIA's example for FLUX, attention included.
    """
    tensor_quant.dynamic_block_quantize_op = _dynamic_block_quantize
    model = original_model(source)
    blocks = source.config.block_names
    linears = {f"{block}.{part}" for block in blocks for part in block_linears(block)}
    chosen = copy.deepcopy(getattr(mtq, config))
    chosen["quant_cfg"] += [
        {"quantizer_name": f"{name}.*_quantizer", "enable": False}
        for name, module in model.named_modules()
        if name not in linears and not list(module.children())
    ]
    with torch.no_grad():
        quantized: Flux = mtq.quantize(model, chosen, lambda model: _run(model, samples))
    return quantized


def nvfp4_bytes(source: FluxSource, rank: int = 0) -> int:
    """Return the bytes of all Linears of blocks in NVFP4, with branches of a rank in bf16."""
    shapes = _shapes(source)
    return sum(n * k // 2 + n * k // 16 + 2 * rank * (n + k) for n, k in shapes)


def branch_operations(source: FluxSource, rank: int) -> float:
    """Return the multiplications of branches of a rank in parts of the Linears' own."""
    shapes = _shapes(source)
    return rank * sum(n + k for n, k in shapes) / sum(n * k for n, k in shapes)


def _shapes(source: FluxSource) -> list[tuple[int, int]]:
    shapes = []
    for block in source.config.block_names:
        tensors = source.submodule(block)
        shapes += [tensors[f"{linear}.weight"].shape for linear in block_linears(block)]
    return [(rows, columns) for rows, columns in shapes]


def _dynamic_block_quantize(
    inputs: Tensor, block_size: int, amax: Tensor | None, *formats: int
) -> Tensor:
    """As ModelOpt's Triton kernel for NVFP4: blocks of 16 with E4M3 scales under ``amax``."""
    assert (block_size, *formats) == (16, 4, 2, 8, 4)
    largest = inputs.abs().amax() if amax is None else amax.amax()
    return fake_quantize_activation(inputs, largest.float() / (E2M1_MAX * E4M3_MAX))


def _run(model: Flux, samples: CalibrationSet) -> None:
    """Show the model all samples, which have one shape, some at once."""
    for first in range(0, len(samples.samples), AT_ONCE):
        chosen = samples.samples[first : first + AT_ONCE]
        latents = torch.cat([sample.latent for sample in chosen])
        texts = [sample.conditioning for sample in chosen]
        context = torch.cat([text.context for text in texts])
        model(
            patchify(latents),
            image_ids(*latents.shape[-2:], batch=len(chosen)),
            context,
            torch.zeros(*context.shape[:2], 3),
            torch.tensor([sample.t for sample in chosen]),
            torch.cat([text.pooled for text in texts if text.pooled is not None]),
            torch.tensor([text.guidance for text in texts]),
        )
