"""Checkpoints and folders that quantization must refuse by name, leaving everything as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blake3 import blake3
from flux_fp4.quant.errors import QuantError
from flux_fp4.quant.errors.calibration import CalibrationError, NotFiniteError
from flux_fp4.quant.errors.files import FolderNotWritableError
from flux_fp4.quant.errors.sources import DamagedCheckpointError, UnknownCheckpointError
from quantize_tiny import quantize, with_recipe
from safetensors.torch import load_file, save_file
from tiny_flux import random_flux, random_samples, save_flux


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_flux(random_flux(), tmp_path / "source.safetensors")


def results(folder: Path) -> list[str]:
    """Every file that carries a final name."""
    return [path.name for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(
    "tensor",
    [
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_mod.lin.weight",
        "single_blocks.1.linear2.bias",
        "single_blocks.0.norm.key_norm.scale",
        "img_in.weight",
        "final_layer.linear.weight",
    ],
)
def test_weight_that_is_not_finite_is_named(
    tensor: str, value: float, source: Path, tmp_path: Path
) -> None:
    state = load_file(source)
    state[tensor].view(-1)[3] = value
    save_file(state, source)
    with pytest.raises(NotFiniteError) as caught:
        quantize(source, tmp_path / "out" / "q.safetensors", statistics=tmp_path / "statistics")
    assert tensor.removesuffix(".weight") in str(caught.value)
    assert "q.safetensors" not in results(tmp_path)


@pytest.mark.parametrize("recipe", ["nvfp4-max", "nvfp4-svdquant-r16", "fp8", "bf16"])
def test_source_is_never_written(recipe: str, source: Path, tmp_path: Path) -> None:
    before = blake3(source.read_bytes()).hexdigest()
    source.chmod(0o444)
    state = source.stat()
    quantize(source, tmp_path / "q.safetensors", with_recipe(recipe))
    assert blake3(source.read_bytes()).hexdigest() == before
    assert source.stat().st_mtime_ns == state.st_mtime_ns


def test_folder_that_cannot_be_written_is_noticed_before_the_work(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"not a folder")
    phases: list[str] = []
    with pytest.raises(FolderNotWritableError, match="extra_model_paths"):
        quantize(
            source,
            tmp_path / "file" / "q.safetensors",
            progress=lambda phase, done, total: phases.append(phase),
            statistics=tmp_path / "statistics",
        )
    assert not phases
    assert (tmp_path / "file").read_bytes() == b"not a folder"


@pytest.mark.parametrize("size", [0, 7, 100, 5000, -1])
def test_truncated_checkpoint_is_named(size: int, source: Path, tmp_path: Path) -> None:
    source.write_bytes(source.read_bytes()[:size])
    with pytest.raises((UnknownCheckpointError, DamagedCheckpointError), match="source"):
        quantize(source, tmp_path / "q.safetensors")
    assert results(tmp_path) == ["source.safetensors"]


def test_checkpoint_that_shrinks_while_it_is_read_leaves_no_result(
    source: Path, tmp_path: Path
) -> None:
    whole = source.read_bytes()

    def shrink(phase: str, done: int, total: int) -> None:
        if phase.startswith("Quantizing"):
            source.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(QuantError):
        quantize(source, tmp_path / "q.safetensors", progress=shrink, statistics=tmp_path / "s")
    assert "q.safetensors" not in results(tmp_path)


def test_latents_of_another_model_are_refused_with_both_numbers(
    source: Path, tmp_path: Path
) -> None:
    from flux_fp4.quant.calibration import CalibrationSample, CalibrationSet

    samples = random_samples()
    wrong = [
        CalibrationSample(torch.zeros(1, 4, 8, 8), s.t, s.conditioning, torch.zeros(1, 4, 8, 8))
        for s in samples.samples
    ]
    with pytest.raises(CalibrationError, match=r"4 channels.*16"):
        quantize(
            source,
            tmp_path / "q.safetensors",
            samples=CalibrationSet(tuple(wrong), 0, samples.timesteps),
        )
    assert "q.safetensors" not in results(tmp_path)
