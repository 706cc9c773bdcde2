"""Results of the stages as text: one paragraph for a node's face, tables for the report."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from .paths import MANIFEST

if TYPE_CHECKING:
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from ..trt_runtime.manifest import EngineManifest
    from .engine_patcher import EnginePatcher


def quantized_summary(checkpoint: QuantizedCheckpoint) -> str:
    """Say what a quantized checkpoint is: variant, recipe, sizes, the worst Linear."""
    metadata = checkpoint.metadata
    size = checkpoint.path.stat().st_size
    worst = min(metadata.linears, key=lambda linear: linear.output_sqnr_db)
    mean = fmean(linear.output_sqnr_db for linear in metadata.linears)
    return "\n".join(
        (
            f"{checkpoint.name}: {metadata.variant}, {metadata.recipe}, "
            f"attention in {'FP8' if metadata.fp8_attention else metadata.high_precision}",
            f"{_megabytes(metadata.source_bytes)} -> {_megabytes(size)} "
            f"({metadata.source_bytes / size:.1f}x smaller)",
            f"output SQNR of {len(metadata.linears)} Linears: {mean:.1f} dB on average, "
            f"{worst.output_sqnr_db:.1f} dB at worst ({worst.name})",
        )
    )


def engine_summary(name: str, manifest: EngineManifest) -> str:
    """Say what an engine is: target, size, and what the build log proved about its kernels."""
    plans = manifest.blocks
    gemms = sum(plan.fp4_gemms_found for plan in plans)
    expected_gemms = sum(plan.fp4_gemms_expected for plan in plans)
    attention = sum(plan.fp8_mha_found for plan in plans)
    expected_attention = sum(plan.fp8_mha_expected for plan in plans)
    profile = manifest.profile
    return "\n".join(
        (
            f"{name}: {len(plans)} plans, {_megabytes(manifest.plan_bytes)}, "
            f"{manifest.built_with}, for {', '.join(manifest.targets)}",
            f"FP4 GEMMs {gemms} of {expected_gemms}, FP8 attention {attention} of "
            f"{expected_attention}",
            f"up to {profile.max_img_tokens} image tokens, {profile.max_txt_tokens} text tokens, "
            f"batch {profile.max_batch}",
        )
    )


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
        f"quantized from {metadata.source_name} with {metadata.calibration_samples} calibration "
        f"samples\ncontent {metadata.content_digest[:16]}, source {metadata.source_digest[:16]}",
        _block_table(checkpoint),
        _linear_table(checkpoint),
        *_engine_sections(checkpoint),
    ]
    return "\n\n".join(sections)


def _block_table(checkpoint: QuantizedCheckpoint) -> str:
    rows = ["block: SQNR of its update"]
    blocks = checkpoint.metadata.blocks
    rows += [f"{block.name:<24}{block.update_sqnr_db:8.1f} dB" for block in blocks]
    return "\n".join(rows)


def _linear_table(checkpoint: QuantizedCheckpoint) -> str:
    rows = [f"{'Linear':<36}{'weight':>11}{'output':>11}{'input amax':>12}"]
    rows += [
        f"{linear.name:<36}{linear.weight_sqnr_db:8.1f} dB{linear.output_sqnr_db:8.1f} dB"
        f"{linear.input_amax:12.4g}"
        for linear in checkpoint.metadata.linears
    ]
    return "\n".join(rows)


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
