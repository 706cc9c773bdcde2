"""Checkpoints that are NVFP4 already, on the trained model: taken over, or refused as noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_layouts import comfy_mark, nvfp4_state, nvfp4_weights
from comfy_in_process import import_comfyui
from quantize_tiny import quantize, with_recipe
from safetensors.torch import load_file, save_file
from small_model_files import DATA, DIFFUSION_MODEL
from torch import Tensor

import_comfyui()

from flux_fp4.quant.calibration import (  # noqa: E402
    CalibrationSet,
    Conditioning,
    rectified_flow_samples,
)
from flux_fp4.quant.errors.sources import NoiseCheckpointError, UnsupportedWeightError  # noqa: E402
from flux_fp4.quant.sources.source import open_source  # noqa: E402
from small_model.autoencoder import latents_of  # noqa: E402
from small_model.digits import load_ink  # noqa: E402


@pytest.fixture(scope="module")
def samples() -> CalibrationSet:
    ink, _ = load_ink()
    prompt = Conditioning(torch.zeros(1, 8, 768), torch.zeros(1, 768), 3.5)
    return rectified_flow_samples(latents_of(ink)[:4], [prompt], 4, seed=0)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in load_file(DATA / DIFFUSION_MODEL).items()}


@pytest.fixture(scope="module")
def native(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as ComfyUI's native NVFP4 stores it."""
    path = tmp_path_factory.mktemp("native") / "native.safetensors"
    return save_native(state, path)


def save_native(state: dict[str, Tensor], path: Path, *, swapped: bool = False) -> Path:
    stored = nvfp4_state(state, nvfp4_weights(state), native=True)
    for name in nvfp4_weights(state):
        if swapped:
            stored[name] = (stored[name] << 4) | (stored[name] >> 4)
        comfy_mark("nvfp4")(name.removesuffix(".weight"), stored)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path)
    return path


def test_native_nvfp4_is_taken_over_bit_for_bit(
    native: Path, state: dict[str, Tensor], samples: CalibrationSet, tmp_path: Path
) -> None:
    result = quantize(native, tmp_path / "q.safetensors", samples=samples)
    assert result.metadata.source_layout == "comfyui-nvfp4"
    linears = {report.name for report in result.metadata.linears}
    weights = nvfp4_weights(state)
    assert {f"{linear}.weight" for linear in linears} <= weights.keys()
    for linear in linears:
        weight = weights[f"{linear}.weight"]
        assert torch.equal(result.load(f"{linear}.weight"), weight.packed), linear
        scale = result.load(f"{linear}.weight_scale").view(torch.uint8)
        assert torch.equal(scale, weight.block_scale.view(torch.uint8)), linear
        assert torch.equal(result.load(f"{linear}.weight_scale_2"), weight.global_scale), linear


def test_searching_recipes_refuse_what_is_nvfp4_already(
    native: Path, samples: CalibrationSet, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedWeightError, match=r"NVFP4 already.*'nvfp4-max' takes"):
        quantize(native, tmp_path / "q.safetensors", with_recipe("nvfp4-mse"), samples)


def test_nvfp4_can_become_bf16_for_older_gpus(
    native: Path, samples: CalibrationSet, tmp_path: Path
) -> None:
    result = quantize(native, tmp_path / "q.safetensors", with_recipe("bf16"), samples)
    name = "single_blocks.0.linear1.weight"
    assert torch.equal(result.load(name), open_source(native).tensors([name])[name])


def test_nibbles_in_another_order_than_the_file_says_are_noticed(
    state: dict[str, Tensor], samples: CalibrationSet, tmp_path: Path
) -> None:
    path = save_native(state, tmp_path / "swapped.safetensors", swapped=True)
    with pytest.raises(NoiseCheckpointError) as caught:
        quantize(path, tmp_path / "q.safetensors", samples=samples)
    assert caught.value.velocity_sqnr_db < 0
    assert not (tmp_path / "q.safetensors").exists()


def test_trained_model_predicts_its_pictures(samples: CalibrationSet, tmp_path: Path) -> None:
    result = quantize(DATA / DIFFUSION_MODEL, tmp_path / "q.safetensors", samples=samples)
    velocity_db = result.metadata.velocity_sqnr_db
    assert velocity_db is not None
    assert 3 < velocity_db < 30, f"{velocity_db:.1f} dB"
