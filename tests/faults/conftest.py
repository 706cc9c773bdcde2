"""A tiny source, and what undisturbed runs make of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.tests.unit.trt_runtime.conftest import blocks, built_folder
from quantize_tiny import quantize
from tiny_flux import ignore_progress, random_flux, save_flux

__all__ = ["blocks", "built_folder"]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 BFL checkpoint with random weights."""
    return save_flux(random_flux(), tmp_path_factory.mktemp("source") / "source.safetensors")


@pytest.fixture(scope="session")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that quantizing and exporting the source make; not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    quantize(source, folder / "tiny.safetensors")
    export_blocks(folder / "tiny.safetensors", ignore_progress)
    return folder


@pytest.fixture(scope="session")
def quantized(undisturbed: Path) -> QuantizedCheckpoint:
    return QuantizedCheckpoint.read(undisturbed / "tiny.safetensors")


def results(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder but locks and statistics."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock") and "statistics" not in path.parts
    }


def temporaries(folder: Path) -> list[str]:
    """Return the files below a folder that a finished stage has no use for."""
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name.endswith((".tmp", ".partial", ".journal", "build.json"))
    ]


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0
