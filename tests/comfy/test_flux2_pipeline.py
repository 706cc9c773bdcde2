"""FLUX.2 from checkpoint to picture latents in one process: every stage on a tiny model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui
from flux_fp4.quant.calibration import rectified_flow_samples
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile
from quantize_tiny import quantize, with_recipe
from tiny_flux import TINY_VARIANTS, ignore_progress, random_flux, save_flux
from torch import Tensor

import_comfyui()

import comfy.model_management as mm  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
from flux_fp4.nodes.calibration import model_space_latents, prompts_of  # noqa: E402
from flux_fp4.nodes.engine_model import EngineOptions  # noqa: E402
from flux_fp4.nodes.stages import load_engine_model  # noqa: E402

SPEC = BuildSpec(
    profile=ShapeProfile(
        max_batch=2,
        min_img_tokens=32,
        opt_img_tokens=64,
        max_img_tokens=256,
        opt_txt_tokens=512,
        max_txt_tokens=512,
    )
)

SIZE = (6, 8)

MIN_STEP_DB = 17.0
"""Of one step's velocity. Measured: dev 20.4 dB, Klein 24.7 dB; with modulation in NVFP4 19.4 and
24.2 dB."""


@pytest.fixture(scope="module", params=["flux2-dev", "flux2-klein"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion_models")
    flux = random_flux(TINY_VARIANTS[request.param])
    return save_flux(flux, folder / f"{request.param}.safetensors")


@pytest.fixture(scope="module", params=["bf16", "fp8", "nvfp4"])
def engine(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An engine folder, made by every stage; the parameter is how modulation is stored."""
    latents = model_space_latents({"samples": picture()})
    samples = rectified_flow_samples(latents, prompts_of(condition(), latents), 2, seed=0)
    path = tmp_path_factory.mktemp("flux_fp4") / "tiny" / "tiny.safetensors"
    options = with_recipe("nvfp4-max", modulation=request.param)
    quantize(source, path, options, samples)
    export_blocks(path, ignore_progress)
    build_engine(path.parent, SPEC, ignore_progress)
    return path.parent / SPEC.folder_name


def picture() -> Tensor:
    return torch.randn(1, 128, *SIZE, generator=torch.Generator().manual_seed(2))


def condition() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(1, 128, 4, 4, generator=generator)
    text = torch.randn(1, 20, 96, generator=generator)
    return [[text, {"reference_latents": [reference]}]]


def sample(model: Any, steps: int) -> Tensor:
    latent = torch.zeros(1, 128, *SIZE)
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, seed=5),
        steps=steps,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        positive=condition(),
        negative=condition(),
        latent_image=latent,
        disable_pbar=True,
    )


@torch.inference_mode()
def test_engine_predicts_nearly_what_stock_flux2_does(source: Path, engine: Path) -> None:
    metadata = QuantizedCheckpoint.read(engine.parent / "tiny.safetensors").metadata
    assert metadata.variant == source.stem
    stock = comfy.sd.load_diffusion_model(str(source))
    model = load_engine_model(str(engine), "reference", EngineOptions())
    noise = comfy.sample.prepare_noise(torch.zeros(1, 128, *SIZE), seed=5)
    # one Euler step from pure noise: the result less the noise is the velocity
    expected, actual = (sample(patcher, steps=1) - noise for patcher in (stock, model))
    db = sqnr_db(expected, actual)
    assert db >= MIN_STEP_DB, f"{db:.1f} dB, at least {MIN_STEP_DB} expected"
    assert db < 60, f"{db:.1f} dB: FP4 did not run"
    assert sample(model, steps=3).isfinite().all()
    mm.unload_all_models()


def test_loading_says_what_it_took(engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_engine_model(str(engine), "reference", EngineOptions())
    (told,) = (m for m in caplog.messages if m.startswith("Opened "))
    for part in ("header of the checkpoint", "checks of the engine", "PyTorch model and weights"):
        assert part in told
