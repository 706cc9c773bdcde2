"""Checkpoints in our layout whose Linears are full precision: exported graphs without rounding."""

from __future__ import annotations

from pathlib import Path

from flux_fp4.quant.flux.model import Flux
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from stored_checkpoint import save_stored


def save_unquantized(model: Flux, path: Path) -> QuantizedCheckpoint:
    """Write an fp32 model."""
    return save_stored(model.state_dict(), path, model.config, high_precision="fp32")
