"""A quantized checkpoint in a few lines of text."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

from .quantized_checkpoint import QuantizedCheckpoint, QuantizedMetadata
from .recipe import Format

_EXACT_DB = 200.0
"""What a header says where there is no noise at all, see ``quantized_checkpoint``."""

FORMAT_NAMES: dict[Format, str] = {"nvfp4": "NVFP4", "fp8": "FP8", "bf16": "bf16"}
"""Formats of a Linear as the user reads them."""


def quantized_summary(checkpoint: QuantizedCheckpoint) -> str:
    """Say what a quantized checkpoint is: variant, recipe, formats, sizes, the worst Linear."""
    metadata = checkpoint.metadata
    size = checkpoint.path.stat().st_size
    lines = [
        f"{checkpoint.name}: {metadata.variant}, {metadata.recipe}",
        f"{format_counts(metadata)}; attention in "
        f"{'FP8' if metadata.fp8_attention else metadata.high_precision}, modulation in "
        f"{FORMAT_NAMES[metadata.options.modulation]}",
        f"{_megabytes(metadata.source_bytes)} -> {_megabytes(size)} "
        f"({size / metadata.source_bytes:.0%})",
        _linears_in_short(metadata),
    ]
    if metadata.options.recipe.training is not None:
        lines.append(_training_in_short(metadata))
    if metadata.distillation is not None:
        report = metadata.distillation
        lines.append(
            f"distilled for {report.steps} steps, best after {report.best_step}: the original's "
            f"velocity for {report.held_out} held-out prompts from {report.before_db:.2f} to "
            f"{report.after_db:.2f} dB"
        )
    if metadata.velocity_sqnr_db is not None:
        lines.append(
            f"{metadata.source_name} predicts the velocity of the calibration pictures at "
            f"{metadata.velocity_sqnr_db:.1f} dB"
        )
    return "\n".join(lines)


def format_counts(metadata: QuantizedMetadata) -> str:
    """Count the Linears in plans by format, for example "Linears: 20 in NVFP4, 8 in FP8"."""
    counts = Counter(linear.format for linear in metadata.linears)
    present = (f"{counts[key]} in {name}" for key, name in FORMAT_NAMES.items() if counts[key])
    return f"Linears: {', '.join(present)}"


def _linears_in_short(metadata: QuantizedMetadata) -> str:
    # a Linear that stays in bf16 is exact and would only raise the average
    quantized = [linear for linear in metadata.linears if linear.format != "bf16"]
    if not quantized:
        return "no Linear is quantized"
    worst = min(quantized, key=lambda linear: linear.output_sqnr_db)
    mean = fmean(linear.output_sqnr_db for linear in quantized)
    return (
        f"output SQNR of the quantized Linears: {mean:.1f} dB on average, "
        f"{worst.output_sqnr_db:.1f} dB at worst ({worst.name})"
    )


def _training_in_short(metadata: QuantizedMetadata) -> str:
    reports = [block.training for block in metadata.blocks if block.training is not None]
    helped = [report for report in reports if report.helped]
    before, after = (
        fmean(getattr(report, name) for report in helped) if helped else 0.0
        for name in ("before_db", "after_db")
    )
    gain = f", their outputs from {before:.1f} to {after:.1f} dB on average" if helped else ""
    return f"training helped {len(helped)} of {len(reports)} blocks{gain}"


def decibels(sqnr_db: float) -> str:
    """Write an SQNR; without any noise it is "exact"."""
    return "exact" if sqnr_db >= _EXACT_DB else f"{sqnr_db:.1f} dB"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
