from __future__ import annotations

from pathlib import Path

import pytest
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from quantize_tiny import quantize
from tiny_flux import random_flux, save_flux


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 BFL checkpoint with random weights."""
    return save_flux(random_flux(), tmp_path_factory.mktemp("source") / "tiny.safetensors")


@pytest.fixture(scope="session")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """The same quantized, FP8 attention included."""
    path = tmp_path_factory.mktemp("models") / "tiny" / "tiny.safetensors"
    return quantize(source, path)
