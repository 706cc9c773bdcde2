"""Checkpoints in our layout whose Linears are stored in any mix of formats, from random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from flux_fp4.quant.flux.model import Flux
from flux_fp4.quant.nvfp4 import quantize_weight
from flux_fp4.quant.quantized_checkpoint import (
    QuantizedCheckpoint,
    is_in_plan,
)
from stored_checkpoint import save_stored
from torch import Tensor

FORMATS = ("nvfp4", "nvfp4-awq", "nvfp4-svdquant", "fp8", "bf16")
INPUT_AMAX = 6.0
RANK = 16


def stored_linear(kind: str, weight: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Store one weight ``[N, K]`` in a format; scales and factors are plausible, not optimal."""
    generator = torch.Generator().manual_seed(seed)
    columns = weight.shape[1]
    if kind == "bf16":
        return {"weight": weight.bfloat16()}
    if kind == "fp8":
        scale = weight.float().abs().amax(1) / 448
        values = (weight.float() / scale[:, None]).to(torch.float8_e4m3fn)
        input_scale = torch.tensor(INPUT_AMAX / 448)
        return {"weight": values, "weight_scale": scale, "input_scale": input_scale}
    extra: dict[str, Tensor] = {}
    residual = weight.float()
    if kind != "nvfp4":
        scale = (0.5 + torch.rand(columns, generator=generator)).bfloat16()
        extra["pre_quant_scale"] = scale
        residual = residual / scale.float()
    if kind == "nvfp4-svdquant":
        u, s, v = torch.linalg.svd(residual, full_matrices=False)
        extra["svd_down"] = v[:RANK].contiguous().bfloat16()
        extra["svd_up"] = (u[:, :RANK] * s[:RANK]).contiguous().bfloat16()
        residual = residual - extra["svd_up"].float() @ extra["svd_down"].float()
    packed = quantize_weight(residual, kind)
    return {
        "weight": packed.packed,
        "weight_scale": packed.block_scale,
        "weight_scale_2": packed.global_scale,
        "input_scale": torch.tensor(INPUT_AMAX / 2688),
        **extra,
    }


def save_mixed(
    model: Flux,
    path: Path,
    formats: Mapping[str, str],
    fp8_attention: bool = True,
    high_precision: str = "bf16",
) -> QuantizedCheckpoint:
    """Write a model with the given format by full name of a Linear; others stay as they are."""
    kept = torch.float32 if high_precision == "fp32" else torch.bfloat16
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        kind = formats.get(name.removesuffix(".weight"), "bf16")
        if name.endswith(".weight") and kind != "bf16":
            stored = stored_linear(kind, tensor, seed=len(state))
            state |= {name.removesuffix("weight") + part: t for part, t in stored.items()}
        else:
            state[name] = tensor.to(kept)
    if fp8_attention:
        for block in model.config.block_names:
            for part, amax in (("q", 8.0), ("k", 8.0), ("v", 6.0)):
                state[f"{block}.attention.{part}_scale"] = torch.tensor(amax / 448).bfloat16()
    return save_stored(state, path, model.config, fp8_attention, high_precision)


def linears_in_plans(model: Flux) -> tuple[str, ...]:
    """Full names of every Linear that belongs to a plan."""
    return tuple(
        name.removesuffix(".weight")
        for name, tensor in model.state_dict().items()
        if is_in_plan(name) and tensor.ndim == 2
    )
