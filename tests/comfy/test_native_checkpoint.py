"""The native NVFP4 file in ComfyUI's stock loader, against our own blocks and emulation."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from block_inputs import block_inputs, embedded_sample
from comfy_in_process import import_comfyui
from mixed_checkpoint import linears_in_plans, save_mixed
from tiny_flux import TINY, TINY_FLUX2, ignore_progress, random_flux

import_comfyui()

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
from comfy.quant_ops import QuantizedTensor  # noqa: E402
from flux_fp4.nodes import paths  # noqa: E402
from flux_fp4.nodes.errors import ArtifactNameError  # noqa: E402
from flux_fp4.nodes.native import SaveNative  # noqa: E402
from flux_fp4.quant.calibration import SampleState  # noqa: E402
from flux_fp4.quant.emulation import emulated_block  # noqa: E402
from flux_fp4.quant.errors.export import NativeTargetError  # noqa: E402
from flux_fp4.quant.flux.config import FluxConfig  # noqa: E402
from flux_fp4.quant.native_checkpoint import save_native_checkpoint  # noqa: E402
from flux_fp4.quant.nvfp4 import NVFP4Weight  # noqa: E402
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint  # noqa: E402
from flux_fp4.quant.sqnr import SQNR  # noqa: E402
from flux_fp4.quant.stack import run_block  # noqa: E402

CONFIGS = {"flux1": TINY, "flux2": TINY_FLUX2}


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> FluxConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def checkpoint(config: FluxConfig, tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    """All block Linears in NVFP4, without FP8 attention, which ComfyUI does not have."""
    model = random_flux(config)
    formats = dict.fromkeys(linears_in_plans(model), "nvfp4")
    path = tmp_path_factory.mktemp("quantized") / "tiny.safetensors"
    return save_mixed(model, path, formats, fp8_attention=False, high_precision="fp32")


@pytest.fixture(scope="module")
def native(checkpoint: QuantizedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diffusion_models") / "native.safetensors"
    save_native_checkpoint(checkpoint, path, ignore_progress)
    return path


@pytest.fixture(autouse=True)
def inference_mode() -> Any:
    with torch.inference_mode():
        yield


def load(path: Path) -> Any:
    """ComfyUI's 'Load Diffusion Model'; fp32, to compare roundings of quantization alone."""
    return comfy.sd.load_diffusion_model(str(path), {"dtype": torch.float32})


def comfy_block(model: Any, name: str, state: SampleState, tokens: dict[str, Any]) -> Any:
    pe = torch.stack((state.cos, -state.sin, state.sin, state.cos), dim=-1)
    pe = pe.unflatten(-1, (2, 2)).unsqueeze(1)
    vec: Any = state.vec
    if model.params.global_modulation and "img" in tokens:
        vec = (model.double_stream_modulation_img(vec), model.double_stream_modulation_txt(vec))
    elif model.params.global_modulation:
        vec, _ = model.single_stream_modulation(vec)
    # ComfyUI's blocks add to their inputs in place
    copies = {key: value.clone() for key, value in tokens.items()}
    return model.get_submodule(name)(**copies, vec=vec, pe=pe)


def update_db(model: Any, ours: Any, name: str, state: SampleState) -> float:
    """SQNR of what ComfyUI's block adds to its input, our block's being the reference."""
    inputs = block_inputs(ours, state)
    tokens = {key: inputs[key] for key in ("img", "txt", "x") if key in inputs}
    theirs = comfy_block(model, name, state, tokens)
    expected = run_block(ours, state)
    ratio = SQNR()
    if expected.txt is None:
        ratio.add(expected.img - tokens["x"], theirs - tokens["x"])
    else:
        ratio.add(expected.img - tokens["img"], theirs[0] - tokens["img"])
        ratio.add(expected.txt - tokens["txt"], theirs[1] - tokens["txt"])
    return ratio.db


def test_stock_loader_takes_every_tensor(
    checkpoint: QuantizedCheckpoint, native: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        model = load(native).model.diffusion_model
    told = [record.message for record in caplog.records if "keys" in record.message.lower()]
    assert not told, told
    for linear in linears_in_plans(random_flux(checkpoint.metadata.config)):
        module = model.get_submodule(linear)
        assert isinstance(module.weight, QuantizedTensor), linear
        assert module.quant_format == "nvfp4"
        weight = NVFP4Weight(
            *(checkpoint.load(f"{linear}.{part}") for part in ("weight", "weight_scale")),
            checkpoint.load(f"{linear}.weight_scale_2"),
        )
        assert torch.equal(module.weight.dequantize(), weight.dequantize()), linear
        assert torch.equal(module.input_scale, checkpoint.load(f"{linear}.input_scale")), linear


@pytest.mark.parametrize("name", TINY.block_names)
def test_block_without_fp4_compute(
    checkpoint: QuantizedCheckpoint, native: Path, config: FluxConfig, name: str
) -> None:
    """On a GPU without FP4, as here, ComfyUI dequantizes weights and leaves inputs alone."""
    model = random_flux(config)
    ours = model.get_submodule(name)
    for linear in linears_in_plans(model):
        if linear.startswith(f"{name}."):
            parts = (checkpoint.load(f"{linear}.{part}") for part in ("weight", "weight_scale"))
            weight = NVFP4Weight(*parts, checkpoint.load(f"{linear}.weight_scale_2"))
            model.get_submodule(linear).weight.copy_(weight.dequantize())
    db = update_db(load(native).model.diffusion_model, ours, name, embedded_sample(config=config))
    assert db > 90, f"{name}: {db:.1f} dB; a Linear in the original weight would give about 20"


@pytest.mark.parametrize("name", TINY.block_names)
@pytest.mark.parametrize("factor", [1.0, 0.1], ids=["wide_scale", "saturating_scale"])
def test_block_with_fp4_compute(
    checkpoint: QuantizedCheckpoint,
    native: Path,
    config: FluxConfig,
    name: str,
    factor: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU with FP4 ComfyUI quantizes inputs by `input_scale`, as our emulation does."""
    monkeypatch.setattr(comfy.model_management, "supports_nvfp4_compute", lambda device: True)
    model = load(native).model.diffusion_model
    tensors = checkpoint.block_tensors(name)
    for part in [part for part in tensors if part.endswith(".input_scale")]:
        tensors[part] = tensors[part] * factor
        model.get_submodule(f"{name}.{part.removesuffix('.input_scale')}").input_scale.mul_(factor)
    block = random_flux(config).get_submodule(name)
    emulated = emulated_block(block, tensors)  # type: ignore[arg-type]
    state = embedded_sample(config=config)
    with_fp4, without = (update_db(model, ours, name, state) for ours in (emulated, block))
    measured = f"{name}: {with_fp4:.1f} dB to the emulation, {without:.1f} dB to full precision"
    assert with_fp4 > 40, measured
    assert without < 20, measured


def test_stock_model_samples(native: Path, config: FluxConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(1, config.vec_in_dim, generator=generator) if config.vec_in_dim else None
    context = torch.randn(1, 8, config.context_in_dim, generator=generator)
    condition = [[context, {"pooled_output": pooled}]]
    latent = torch.zeros(1, config.out_channels, 8, 8)
    noise = comfy.sample.prepare_noise(latent, seed=5)
    sampled = comfy.sample.sample(
        load(native), noise, 2, 1.0, "euler", "simple", condition, condition, latent, seed=5
    )
    assert sampled.isfinite().all()
    assert sampled.std() > 0.1


@pytest.fixture
def model_folders(
    tmp_path: Path, checkpoint: QuantizedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """ComfyUI's model folders with the checkpoint in ours; its own two are still empty."""
    folder = tmp_path / "flux_fp4" / "tiny"
    folder.mkdir(parents=True)
    shutil.copy(checkpoint.path, folder / "tiny.safetensors")
    own = [str(tmp_path / name) for name in ("unet", "diffusion_models")]
    folders = {
        paths.MODEL_FOLDER: ([str(folder.parent)], {".safetensors"}),
        "diffusion_models": (own, {".safetensors"}),
    }
    for name in own:
        Path(name).mkdir()
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the node wrote on itself; there is no server to send it to."""
    texts: list[str] = []

    class Progress:
        def __init__(self, node_id: str) -> None:
            self.show = texts.append

        def __call__(self, phase: str, done: int, total: int) -> None:
            pass

    monkeypatch.setattr("flux_fp4.nodes.progress.NodeProgress", Progress)
    monkeypatch.setattr(SaveNative, "hidden", SimpleNamespace(unique_id="1"))
    return texts


def test_node_saves_what_load_diffusion_model_lists(model_folders: Path, shown: list[str]) -> None:
    output = SaveNative.execute("tiny", "mine")
    assert output.args == ("mine.safetensors",)
    assert (model_folders / "diffusion_models" / "mine.safetensors").is_file()
    assert "mine.safetensors" in folder_paths.get_filename_list("diffusion_models")
    assert shown[0].startswith("mine.safetensors: 0.0")
    assert load(Path(folder_paths.get_full_path("diffusion_models", "mine.safetensors")))


def test_node_finds_its_file_in_any_folder(model_folders: Path, shown: list[str]) -> None:
    SaveNative.execute("tiny", "mine")
    moved = model_folders / "unet" / "mine.safetensors"
    (model_folders / "diffusion_models" / "mine.safetensors").rename(moved)
    assert paths.native_checkpoint("mine") == moved


@pytest.mark.parametrize("folder", ["unet", "diffusion_models"])
def test_node_leaves_other_files_alone(model_folders: Path, shown: list[str], folder: str) -> None:
    file = model_folders / folder / "flux1-dev.safetensors"
    file.write_bytes(b"a model")
    with pytest.raises(NativeTargetError, match="Enter another name"):
        SaveNative.execute("tiny", "flux1-dev")
    assert file.read_bytes() == b"a model"


@pytest.mark.parametrize("name", ["", "../x", "a/b", "C:x", "nul", ".x"])
def test_node_takes_plain_names_only(model_folders: Path, shown: list[str], name: str) -> None:
    with pytest.raises(ArtifactNameError, match="Save as ComfyUI NVFP4 Checkpoint"):
        SaveNative.execute("tiny", name)
