"""Recipe ``auto``: the cheapest format per Linear that keeps each block's error within a budget.

Sensitivity is measured, not assumed: each Linear of a block is quantized alone, in each format, and
what the block adds to its input is compared with full precision on the probes. Errors of different
Linears are nearly independent, so their noise energies add up; the resulting checkpoint reports the
measured total.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .block_quantizer import attention_scales, update_sqnr_db
from .durations import block_weights, measure_work
from .errors.recipes import FormatBudgetError
from .flux.config import block_linears
from .linear_quantizer import quantize_linear
from .progress import Progress, Record, unrecorded
from .recipe import Format, FormatBudget, QuantizeOptions
from .sources.source import FluxSource
from .stack import block_statistics, block_with_weights
from .statistics_files import StatisticsFolder

BITS: dict[Format, float] = {"nvfp4": 4.5, "fp8": 8.0, "bf16": 16.0}
"""Bits per weight: NVFP4 has an 8-bit scale for 16 weights."""

_LADDER: tuple[Format, ...] = ("nvfp4", "fp8", "bf16")


@dataclass(frozen=True)
class Sensitivity:
    """What the formats of one Linear cost and spoil.

    Attributes:
        linear: Full name.
        weights: How many the Linear has.
        noise: Noise energy in the block's update over signal energy, by format.
    """

    linear: str
    weights: int
    noise: Mapping[Format, float]

    def bytes(self, chosen: Format) -> float:
        """Return the size in a format."""
        return self.weights * BITS[chosen] / 8


@dataclass(frozen=True)
class _Upgrade:
    linear: Sensitivity
    chosen: Format
    bytes: float
    noise: float
    """Noise that it removes."""

    @property
    def gain(self) -> float:
        return self.noise / self.bytes


def choose_formats(
    source: FluxSource,
    folder: StatisticsFolder,
    options: QuantizeOptions,
    start: Mapping[str, Format],
    progress: Progress,
    device: str,
    dtype: torch.dtype,
    record: Record = unrecorded,
) -> dict[str, Format]:
    """Measure every Linear and choose its format.

    Args:
        source: The weights.
        folder: Statistics of every block.
        options: Their recipe has a budget.
        start: Cheapest format of each Linear.
        progress: Called before each block; may raise to cancel.
        device: Where to compute.
        dtype: Type to compute in.
        record: Told how long each block took.

    Returns:
        Format by full name of the Linear.

    Raises:
        FormatBudgetError: The budget cannot be kept.
    """
    budget = options.recipe.auto
    assert budget is not None
    blocks, fixed = {}, {}
    names = source.config.block_names
    for done, name in enumerate(names):
        progress(f"Measuring {name}", done, len(names))
        started = time.monotonic()
        blocks[name], fixed[name] = _measured(name, source, folder, options, device, dtype)
        seconds = time.monotonic() - started
        record(measure_work(name, device), block_weights(source, name), seconds)
    return formats_within(budget, blocks, fixed, start)


def formats_within(
    budget: FormatBudget,
    blocks: Mapping[str, Sequence[Sensitivity]],
    fixed_noise: Mapping[str, float],
    start: Mapping[str, Format],
) -> dict[str, Format]:
    """Spend bytes where they remove the most noise.

    Args:
        budget: Floor per block, total size, or both.
        blocks: Sensitivities by block.
        fixed_noise: Noise of each block that no format of a Linear changes: of FP8 attention.
        start: Cheapest format of each Linear.

    Returns:
        Format by full name of the Linear.

    Raises:
        FormatBudgetError: The floor is out of reach, or it and the size exclude each other.
    """
    chosen = dict(start)
    everything = [entry for entries in blocks.values() for entry in entries]
    if budget.floor_db is not None:
        for block, entries in blocks.items():
            _reach_floor(block, entries, fixed_noise[block], budget.floor_db, chosen)
    size = sum(entry.bytes(chosen[entry.linear]) for entry in everything)
    if budget.max_bytes is None:
        return chosen
    if size > budget.max_bytes:
        goal = f" for {budget.floor_db} dB" if budget.floor_db is not None else ""
        raise FormatBudgetError(
            f"the smallest weights{goal} take {size / 2**30:.3f} GiB",
            f"{budget.max_bytes / 2**30:.3f} GiB are allowed",
        )
    while fitting := [
        upgrade
        for upgrade in _upgrades(everything, chosen)
        if size + upgrade.bytes <= budget.max_bytes
    ]:
        best = max(fitting, key=lambda upgrade: upgrade.gain)
        chosen[best.linear.linear] = best.chosen
        size += best.bytes
    return chosen


def _reach_floor(
    block: str,
    entries: Sequence[Sensitivity],
    fixed_noise: float,
    floor_db: float,
    chosen: dict[str, Format],
) -> None:
    limit = 10 ** (-floor_db / 10)
    while fixed_noise + sum(entry.noise[chosen[entry.linear]] for entry in entries) > limit:
        upgrades = list(_upgrades(entries, chosen))
        if not upgrades:
            best_db = -10 * math.log10(fixed_noise)
            raise FormatBudgetError(
                f"'{block}' reaches {best_db:.1f} dB even with all Linears in bf16, because its "
                "attention is in FP8",
                f"the quality floor is {floor_db} dB",
            )
        best = max(upgrades, key=lambda upgrade: upgrade.gain)
        chosen[best.linear.linear] = best.chosen


def _upgrades(entries: Sequence[Sensitivity], chosen: Mapping[str, Format]) -> Iterator[_Upgrade]:
    for entry in entries:
        now = chosen[entry.linear]
        for better in _LADDER[_LADDER.index(now) + 1 :]:
            noise = entry.noise[now] - entry.noise[better]
            if noise > 0:
                yield _Upgrade(entry, better, entry.bytes(better) - entry.bytes(now), noise)


def _measured(
    name: str,
    source: FluxSource,
    folder: StatisticsFolder,
    options: QuantizeOptions,
    device: str,
    dtype: torch.dtype,
) -> tuple[list[Sensitivity], float]:
    tensors = source.submodule(name, device)
    block = block_with_weights(name, source.config, tensors, dtype)
    statistics = block_statistics(folder, name)
    entries = []
    for linear in block_linears(name):
        weight = tensors[f"{linear}.weight"]
        packed = source.packed(f"{name}.{linear}", device)
        noise: dict[Format, float] = {"bf16": 0.0}
        for tried in ("nvfp4", "fp8"):
            parts = quantize_linear(
                f"{name}.{linear}", weight, packed, statistics.linears[linear], options, tried
            )
            quantized = {f"{linear}.{part}": tensor for part, tensor in parts.items()}
            noise[tried] = 10 ** (-update_sqnr_db(block, quantized, statistics) / 10)
        entries.append(Sensitivity(f"{name}.{linear}", weight.numel(), noise))
    if not options.fp8_attention:
        return entries, 0.0
    scales = attention_scales(source.config.head_dim, statistics, options)
    return entries, 10 ** (-update_sqnr_db(block, scales, statistics) / 10)
