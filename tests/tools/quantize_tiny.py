"""Quantizing a file with the defaults of tests: random samples, statistics beside the result."""

from __future__ import annotations

from pathlib import Path

import torch
from flux_fp4.quant.calibration import CalibrationSet
from flux_fp4.quant.progress import Progress
from flux_fp4.quant.quantize import quantize_checkpoint
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.recipe import QuantizeOptions, named_recipe
from flux_fp4.quant.sources.source import open_source
from tiny_flux import ignore_progress, random_samples


def quantize(
    source: Path,
    destination: Path,
    options: QuantizeOptions | None = None,
    samples: CalibrationSet | None = None,
    progress: Progress = ignore_progress,
    statistics: Path | None = None,
) -> QuantizedCheckpoint:
    """Quantize ``source`` in fp32: on some machines only bf16 has matrix units."""
    return quantize_checkpoint(
        open_source(source),
        destination,
        samples or random_samples(),
        options or QuantizeOptions(),
        statistics or destination.parent / "statistics",
        progress,
        dtype=torch.float32,
    )


def with_recipe(name: str, **changes: object) -> QuantizeOptions:
    """Return options with a recipe of the pack."""
    return QuantizeOptions(recipe=named_recipe(name), **changes)  # type: ignore[arg-type]
