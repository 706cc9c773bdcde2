"""Packing one block by its statistics, and measuring what that did to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .calibration import SampleState
from .emulation import attention_root_scale, emulated_block, emulated_linear, linear_parts
from .linear_quantizer import quantize_linear, smoothing_scales
from .nvfp4 import E4M3_MAX, NVFP4Weight
from .quantized_checkpoint import BlockReport, LinearReport, finite_or_limit
from .recipe import Format, QuantizeOptions
from .row_parallel import side_by_side
from .sqnr import SQNR, sqnr_db
from .stack import Block, placed, run_block, tokens
from .statistics import BlockStatistics, LinearStatistics, spread

_REPORT_OUTPUTS = 256
"""Outputs of a Linear that its report looks at, evenly spaced: with 128 rows, 32768 values."""


@dataclass(frozen=True)
class QuantizedBlock:
    """Result of quantizing one block.

    Attributes:
        tensors: Quantized tensors by name relative to the block.
        linears: Report by Linear.
        report: Report on the block.
    """

    tensors: dict[str, Tensor]
    linears: tuple[LinearReport, ...]
    report: BlockReport


def quantize_block(
    name: str,
    block: Block,
    weights: Mapping[str, Tensor],
    packed: Mapping[str, NVFP4Weight | None],
    statistics: BlockStatistics,
    options: QuantizeOptions,
    formats: Mapping[str, Format],
    head_dim: int,
    heartbeat: Callable[[], None],
) -> QuantizedBlock:
    """Quantize a block.

    Args:
        name: For example ``double_blocks.0``.
        block: The block in the type to compute in; unchanged.
        weights: Of its Linears, as the checkpoint stores them.
        packed: By Linear: its weight where the checkpoint holds it in NVFP4 already.
        statistics: Of its inputs.
        options: The recipe.
        formats: By Linear.
        head_dim: Width of an attention head.
        heartbeat: Called at least once per Linear; may raise to cancel.

    Returns:
        The quantized tensors with their report.
    """
    smoothing = smoothing_scales(weights, statistics.linears, options.recipe, formats, heartbeat)
    tensors: dict[str, Tensor] = {}
    for linear in formats:
        heartbeat()
        parts = quantize_linear(
            f"{name}.{linear}",
            weights[linear],
            packed[linear],
            statistics.linears[linear],
            options,
            formats[linear],
            smoothing.get(linear),
        )
        tensors |= {f"{linear}.{part}": tensor for part, tensor in parts.items()}
    if options.fp8_attention:
        tensors |= attention_scales(head_dim, statistics, options)
    return measured_block(name, block, tensors, statistics, formats)


def measured_block(
    name: str,
    block: Block,
    tensors: dict[str, Tensor],
    statistics: BlockStatistics,
    formats: Mapping[str, Format],
) -> QuantizedBlock:
    """Measure what quantized tensors do to a block.

    Args:
        name: For example ``double_blocks.0``.
        block: The block in the type to compute in; unchanged.
        tensors: Quantized tensors by name relative to it.
        statistics: Of its inputs.
        formats: By Linear.
    """

    def report(linear: str) -> LinearReport:
        parts, seen = linear_parts(linear, tensors), statistics.linears[linear]
        weight_db, output_db = linear_sqnr_db(block.get_submodule(linear), parts, seen)
        return LinearReport(
            name=f"{name}.{linear}",
            format=formats[linear],
            weight_sqnr_db=finite_or_limit(weight_db),
            output_sqnr_db=finite_or_limit(output_db),
            input_amax=seen.range.amax,
        )

    device = next(block.parameters()).device
    reports = tuple(side_by_side([partial(report, linear) for linear in formats], device))
    update_db = finite_or_limit(update_sqnr_db(block, tensors, statistics))
    return QuantizedBlock(tensors, reports, BlockReport(name=name, update_sqnr_db=update_db))


def attention_scales(
    head_dim: int, statistics: BlockStatistics, options: QuantizeOptions
) -> dict[str, Tensor]:
    """Return ``attention.q_scale``, ``.k_scale`` and ``.v_scale``."""
    # the plan multiplies q and k by the root before it rounds them
    root = attention_root_scale(head_dim)
    factors = {"q": root, "k": root, "v": 1.0}
    return {
        f"attention.{part}_scale": fp8_scale(
            options.headroom * factor * statistics.attention[part].at(options.percentile)
        )
        for part, factor in factors.items()
    }


def fp8_scale(amax: float) -> Tensor:
    """Return ``amax / 448``, rounded up to bf16 so that the plan can hold it in any type."""
    exact = torch.tensor(max(amax, torch.finfo(torch.float32).tiny) / E4M3_MAX)
    rounded = exact.bfloat16()
    if rounded.float() < exact:
        rounded = torch.nextafter(rounded, torch.tensor(torch.inf, dtype=torch.bfloat16))
    return rounded


def linear_sqnr_db(
    module: Any, parts: Mapping[str, Tensor], statistics: LinearStatistics
) -> tuple[float, float]:
    """Measure a quantized Linear on some of its outputs.

    Args:
        module: The Linear in high precision.
        parts: Its quantized tensors by name relative to it.
        statistics: Their rows are the inputs.

    Returns:
        SQNR of the weight and of the output, in dB.
    """
    outputs = spread(len(module.weight), _REPORT_OUTPUTS).to(module.weight.device)
    weight = module.weight.detach()[outputs].float()
    sliced = {
        f"linear.{part}": tensor[outputs] if part in _BY_OUTPUT and tensor.ndim else tensor
        for part, tensor in parts.items()
    }
    bias = None if module.bias is None else module.bias.detach()[outputs].float()
    emulated = emulated_linear("linear", sliced, sliced.get("linear.bias", bias))
    x = statistics.rows.to(weight)
    output_db = sqnr_db(functional.linear(x, weight, bias), emulated(x))
    return sqnr_db(weight, emulated.effective_weight()), output_db


_BY_OUTPUT = ("weight", "weight_scale", "svd_up", "bias")
"""Tensors of a Linear with one row per output."""


def update_sqnr_db(
    block: Block, tensors: Mapping[str, Tensor], statistics: BlockStatistics
) -> float:
    """Measure what quantized tensors do to what the block adds to its input, on the probes."""
    emulated = emulated_block(block, tensors)

    def measured(probe: SampleState) -> SQNR:
        state, ratio = placed(probe, block), SQNR()
        before = tokens(state).float()
        expected = tokens(run_block(block, state)).float() - before
        ratio.add(expected, tokens(run_block(emulated, state)).float() - before)
        return ratio

    device = next(block.parameters()).device
    total = SQNR()
    for part in side_by_side([partial(measured, probe) for probe in statistics.probes], device):
        total.add_energies(part.signal, part.noise)
    return total.db
