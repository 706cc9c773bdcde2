"""Results of the stages as text: one paragraph for a node's face, tables for the report."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from .paths import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..quant.quantized_checkpoint import QuantizedCheckpoint, QuantizedMetadata
    from ..quant.recipe import Format
    from ..trt_runtime.manifest import EngineManifest, PlanEntry
    from .engine_patcher import EnginePatcher


_EXACT_DB = 200.0
"""What a header says where there is no noise at all, see ``quantized_checkpoint``."""

_FORMATS: dict[Format, str] = {"nvfp4": "NVFP4", "fp8": "FP8", "bf16": "bf16"}
"""Formats of a Linear as the user reads them."""


def quantized_summary(checkpoint: QuantizedCheckpoint) -> str:
    """Say what a quantized checkpoint is: variant, recipe, formats, sizes, the worst Linear."""
    metadata = checkpoint.metadata
    size = checkpoint.path.stat().st_size
    lines = [
        f"{checkpoint.name}: {metadata.variant}, {metadata.recipe}",
        f"{format_counts(metadata)}; attention in "
        f"{'FP8' if metadata.fp8_attention else metadata.high_precision}, modulation in "
        f"{_FORMATS[metadata.options.modulation]}",
        f"{_megabytes(metadata.source_bytes)} -> {_megabytes(size)} "
        f"({size / metadata.source_bytes:.0%})",
        _linears_in_short(metadata),
    ]
    if metadata.velocity_sqnr_db is not None:
        lines.append(
            f"{metadata.source_name} predicts the velocity of the calibration pictures at "
            f"{metadata.velocity_sqnr_db:.1f} dB"
        )
    return "\n".join(lines)


def format_counts(metadata: QuantizedMetadata) -> str:
    """Count the Linears in plans by format, for example "Linears: 20 in NVFP4, 8 in FP8"."""
    counts = Counter(linear.format for linear in metadata.linears)
    present = (f"{counts[key]} in {name}" for key, name in _FORMATS.items() if counts[key])
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


def engine_summary(name: str, manifest: EngineManifest) -> str:
    """Say what an engine is: target, size, and what the build log proved about its kernels."""
    plans = manifest.blocks
    profile = manifest.profile
    return "\n".join(
        (
            f"{name}: {len(plans)} plans, {_megabytes(manifest.plan_bytes)}, "
            f"{manifest.built_with}, for {', '.join(manifest.targets)}",
            _kernels(plans),
            f"up to {profile.max_img_tokens} image tokens, {profile.max_txt_tokens} text tokens, "
            f"batch {profile.max_batch}",
        )
    )


def _kernels(plans: Sequence[PlanEntry]) -> str:
    kinds = {"FP4 GEMMs": "fp4_gemms", "FP8 GEMMs": "fp8_gemms", "FP8 attention": "fp8_mha"}
    texts = []
    for label, kind in kinds.items():
        found = sum(getattr(plan, f"{kind}_found") for plan in plans)
        expected = sum(getattr(plan, f"{kind}_expected") for plan in plans)
        if expected:
            texts.append(f"{label} {found} of {expected}")
    return ", ".join(texts) or "everything in bf16"


def model_summary(name: str, patcher: EnginePatcher) -> str:
    """Say how a MODEL runs: backend and why, and where its weights are."""
    engine = patcher.model.engine
    because = f" ({engine.backend_reason})" if engine.backend_reason else ""
    torch_bytes = patcher.model_size() - patcher.engine_bytes()
    return "\n".join(
        (
            f"{name} on {engine.backend_name}{because}",
            f"{_megabytes(patcher.engine_bytes())} in the engine, {_megabytes(torch_bytes)} in "
            "PyTorch (embedders, modulation, final layer)",
        )
    )


def full_report(path: Path) -> str:
    """Report on a quantized checkpoint and on every engine beside it."""
    from ..quant.quantized_checkpoint import QuantizedCheckpoint

    checkpoint = QuantizedCheckpoint.read(path)
    metadata = checkpoint.metadata
    sections = [
        quantized_summary(checkpoint),
        _origin(metadata),
        _block_table(checkpoint),
        _linear_table(checkpoint),
        *_engine_sections(checkpoint),
    ]
    return "\n\n".join(sections)


def _origin(metadata: QuantizedMetadata) -> str:
    options = metadata.options
    return "\n".join(
        (
            f"quantized from {metadata.source_name} ({metadata.source_layout}) with "
            f"{metadata.calibration_samples} calibration samples",
            f"activation scales: percentile {options.percentile:g}, headroom {options.headroom:g}",
            f"content {metadata.content_digest[:16]}, source {metadata.source_digest[:16]}",
        )
    )


def _block_table(checkpoint: QuantizedCheckpoint) -> str:
    rows = ["block: SQNR of its update"]
    blocks = checkpoint.metadata.blocks
    rows += [f"{block.name:<24}{decibels(block.update_sqnr_db):>11}" for block in blocks]
    return "\n".join(rows)


def _linear_table(checkpoint: QuantizedCheckpoint) -> str:
    rows = [f"{'Linear':<36}{'format':<8}{'weight':>11}{'output':>11}{'input amax':>12}"]
    rows += [
        f"{linear.name:<36}{_FORMATS[linear.format]:<8}{decibels(linear.weight_sqnr_db):>11}"
        f"{decibels(linear.output_sqnr_db):>11}{linear.input_amax:12.4g}"
        for linear in checkpoint.metadata.linears
    ]
    return "\n".join(rows)


def decibels(sqnr_db: float) -> str:
    """Write an SQNR; without any noise it is "exact"."""
    return "exact" if sqnr_db >= _EXACT_DB else f"{sqnr_db:.1f} dB"


def _engine_sections(checkpoint: QuantizedCheckpoint) -> list[str]:
    from ..trt_runtime.errors import EngineError
    from ..trt_runtime.manifest import load_manifest

    sections = []
    for folder in sorted(file.parent for file in checkpoint.path.parent.glob(f"*/{MANIFEST}")):
        name = f"{checkpoint.name}/{folder.name}"
        try:
            manifest = load_manifest(folder)
        except EngineError as error:
            # One damaged engine is a finding of the report, not a reason to have none.
            sections.append(f"{name} is unusable: {error}")
            continue
        text = engine_summary(name, manifest)
        if manifest.checkpoint_digest != checkpoint.metadata.content_digest:
            text += "\noutdated: the checkpoint was quantized again after this build"
        sections.append(text)
    return sections or ["no engine has been built"]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
