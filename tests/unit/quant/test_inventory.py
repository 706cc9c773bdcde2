"""Quantized checkpoints in several folders, readable or not."""

from __future__ import annotations

from pathlib import Path

from flux_fp4.quant.inventory import stored_checkpoints
from flux_fp4.quant.model_folders import ModelFolders
from quantize_tiny import quantize
from tiny_flux import random_flux, save_flux


def test_all_folders_are_listed(tmp_path: Path) -> None:
    source = save_flux(random_flux(), tmp_path / "source.safetensors")
    first, second = tmp_path / "first", tmp_path / "second"
    path = quantize(source, first / "good" / "good.safetensors").path
    damaged = second / "damaged" / "damaged.safetensors"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"\xff" * 50)
    (second / "no-checkpoint").mkdir()
    good, bad = stored_checkpoints(ModelFolders([first, second, tmp_path / "absent"]))
    assert (good.name, good.bytes, good.fault) == ("good", path.stat().st_size, "")
    assert good.metadata is not None
    assert good.content_digest == good.metadata.content_digest
    assert not good.is_exported
    (path.parent / "double_blocks.0.onnx").touch()
    assert stored_checkpoints(ModelFolders([first]))[0].is_exported
    assert (bad.name, bad.bytes, bad.metadata, bad.content_digest) == ("damaged", 50, None, None)
    assert "cannot be read" in bad.fault
