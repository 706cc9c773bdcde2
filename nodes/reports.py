"""Results of the stages as text: one paragraph for a node's face, tables for the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..quant.summary import FORMAT_NAMES, decibels, quantized_summary
from ..trt_runtime.summary import engine_summary
from .paths import MANIFEST

if TYPE_CHECKING:
    from ..quant.quantized_checkpoint import QuantizedCheckpoint, QuantizedMetadata
    from .engine_patcher import EnginePatcher

__all__ = ["engine_summary", "full_report", "model_summary", "quantized_summary"]


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
        f"{linear.name:<36}{FORMAT_NAMES[linear.format]:<8}{decibels(linear.weight_sqnr_db):>11}"
        f"{decibels(linear.output_sqnr_db):>11}{linear.input_amax:12.4g}"
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
