"""Calibrating, packing and measuring one block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calibration import SampleState
from .emulation import attention_root_scale, emulated_block
from .errors import NotFiniteError
from .flux.blocks import DoubleStreamBlock, SingleStreamBlock
from .flux.config import block_linears
from .modelopt_calibration import input_amax
from .nvfp4 import E2M1_MAX, E4M3_MAX, NVFP4Weight, quantize_weight
from .quantized_checkpoint import BlockReport, LinearReport, finite_or_limit
from .recipe import QuantizeOptions
from .sqnr import SQNR, sqnr_db

AMAX_HEADROOM = 1.25
"""Factor on calibrated activation maxima; ModelOpt's is 1. Other pictures reach a little beyond the
few samples of a calibration, and what lies beyond is cut off. Room for them is nearly free: block
scales and FP8 values are floating point with 17 and more powers of two between their ends."""

_REPORT_SAMPLES = 4
"""Samples whose outputs are compared: the energies average over thousands of tokens each."""

Block = DoubleStreamBlock | SingleStreamBlock


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
    source: Mapping[str, Tensor],
    states: Sequence[SampleState],
    options: QuantizeOptions,
    heartbeat: Callable[[], None],
) -> tuple[QuantizedBlock, list[SampleState]]:
    """Quantize a block and carry the samples through it in full precision.

    Args:
        name: For example ``double_blocks.0``.
        block: The block in the type to compute in; unchanged.
        source: The block's tensors as the checkpoint stores them: weights are packed from these.
        states: Samples before the block.
        options: The recipe.
        heartbeat: Called between samples; raises to cancel.

    Returns:
        The quantized tensors with their report, and the samples after the block.
    """
    linears = block_linears(name)
    outputs, amax, attention_amax = _calibrate(name, block, linears, states, heartbeat)
    weights = {
        linear: quantize_weight(source[f"{linear}.weight"], f"{name}.{linear}")
        for linear in linears
    }
    tensors = _quantized_tensors(weights, amax)
    if options.fp8_attention:
        tensors |= {
            f"attention.{part}_scale": fp8_scale(AMAX_HEADROOM * attention_amax[part])
            for part in ("q", "k", "v")
        }
    linear_reports, report = _measure(name, block, tensors, weights, states, outputs, heartbeat)
    reports = tuple(
        LinearReport(
            name=f"{name}.{linear}",
            weight_sqnr_db=linear_reports[linear][0],
            output_sqnr_db=linear_reports[linear][1],
            input_amax=amax[linear],
        )
        for linear in linears
    )
    return QuantizedBlock(tensors, reports, report), outputs


def fp8_scale(amax: float) -> Tensor:
    """Return ``amax / 448``, rounded up to bf16 so that the plan can hold it in any type."""
    exact = torch.tensor(max(amax, torch.finfo(torch.float32).tiny) / E4M3_MAX)
    rounded = exact.bfloat16()
    if rounded.float() < exact:
        rounded = torch.nextafter(rounded, torch.tensor(torch.inf, dtype=torch.bfloat16))
    return rounded


def run_block(block: Block, state: SampleState) -> SampleState:
    """Carry one sample through a block."""
    mods = block.modulation_vectors(state.vec)
    if isinstance(block, DoubleStreamBlock):
        assert state.txt is not None
        img, txt = block(state.img, state.txt, state.cos, state.sin, mods)
        return SampleState(img, txt, state.vec, state.cos, state.sin)
    x = state.img if state.txt is None else torch.cat((state.txt, state.img), dim=1)
    return SampleState(block(x, state.cos, state.sin, mods), None, state.vec, state.cos, state.sin)


def _calibrate(
    name: str,
    block: Block,
    linears: Sequence[str],
    states: Sequence[SampleState],
    heartbeat: Callable[[], None],
) -> tuple[list[SampleState], dict[str, float], dict[str, float]]:
    observed = copy.deepcopy(block)
    attention_amax = dict.fromkeys("qkv", 0.0)

    def observe(module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
        root = attention_root_scale(qkv[0].shape[-1])
        for part, tensor, factor in zip("qkv", qkv, (root, root, 1.0), strict=True):
            amax = factor * tensor.abs().amax().item()
            attention_amax[part] = max(attention_amax[part], amax)

    outputs: list[SampleState] = []

    def forward() -> None:
        for state in states:
            heartbeat()
            outputs.append(run_block(observed, state))

    handle = observed.attention.register_forward_pre_hook(observe)
    amax = input_amax(observed, linears, forward, name)
    handle.remove()
    if not all(torch.isfinite(state.img).all() for state in outputs):
        raise NotFiniteError(
            f"The output of '{name}'", "Try other latents or prompts for calibration."
        )
    return outputs, amax, attention_amax


def _quantized_tensors(
    weights: dict[str, NVFP4Weight], amax: dict[str, float]
) -> dict[str, Tensor]:
    tensors = {}
    for linear, weight in weights.items():
        tensors[f"{linear}.weight"] = weight.packed
        tensors[f"{linear}.weight_scale"] = weight.block_scale
        tensors[f"{linear}.weight_scale_2"] = weight.global_scale
        # second-level activation scale of NVFP4: ModelOpt 0.47 export_onnx.py, amax / (6 * 448)
        scale = AMAX_HEADROOM * amax[linear] / (E2M1_MAX * E4M3_MAX)
        tensors[f"{linear}.input_scale"] = torch.tensor(scale, device=weight.packed.device)
    return tensors


def _measure(
    name: str,
    block: Block,
    tensors: dict[str, Tensor],
    weights: dict[str, NVFP4Weight],
    states: Sequence[SampleState],
    outputs: Sequence[SampleState],
    heartbeat: Callable[[], None],
) -> tuple[dict[str, tuple[float, float]], BlockReport]:
    emulated = emulated_block(block, tensors)
    output_ratio = {linear: SQNR() for linear in weights}

    def compare(linear: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            output_ratio[linear].add(output, emulated.get_submodule(linear)(inputs[0]))

        return hook

    handles = [
        block.get_submodule(linear).register_forward_hook(compare(linear)) for linear in weights
    ]
    update_ratio = SQNR()
    step = max(1, len(states) // _REPORT_SAMPLES)
    for state, output in list(zip(states, outputs, strict=True))[::step]:
        heartbeat()
        run_block(block, state)
        actual = run_block(emulated, state)
        before = _tokens(state)
        update_ratio.add(_tokens(output) - before, _tokens(actual) - before)
    for handle in handles:
        handle.remove()
    reports = {
        linear: (
            finite_or_limit(sqnr_db(block.get_submodule(linear).weight, weight.dequantize())),  # type: ignore[arg-type]
            finite_or_limit(output_ratio[linear].db),
        )
        for linear, weight in weights.items()
    }
    return reports, BlockReport(name=name, update_sqnr_db=finite_or_limit(update_ratio.db))


def _tokens(state: SampleState) -> Tensor:
    return state.img if state.txt is None else torch.cat((state.txt, state.img), dim=1)
