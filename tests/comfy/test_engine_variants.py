"""MODELs of other variants than FLUX.1-dev over an engine, with torch as the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui
from tiny_flux import TINY_VARIANTS, random_flux, save_flux
from torch import Tensor

import_comfyui()

import comfy.model_management as mm  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
from flux_fp4.nodes.engine_patcher import EnginePatcher  # noqa: E402
from flux_fp4.nodes.errors import UnsupportedByEngineError  # noqa: E402
from torch_engine import engine_over  # noqa: E402

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["flux2-dev", "flux2-klein"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / f"{request.param}.safetensors"
    return save_flux(random_flux(TINY_VARIANTS[request.param]), path)


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> Any:
    return comfy.sd.load_diffusion_model(str(checkpoint))


@pytest.fixture(params=[False, True], ids=["plain", "dynamic VRAM"])
def engine(checkpoint: Path, request: pytest.FixtureRequest) -> Any:
    yield engine_over(comfy.sd.load_diffusion_model(str(checkpoint)), dynamic_vram=request.param)
    mm.unload_all_models()


@pytest.fixture(autouse=True)
def inference_mode() -> Any:
    with torch.inference_mode():
        yield


def condition(seed: int = 0, **options: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, 20, 96, generator=generator), options]]


def sample(
    model: Any, positive: list[Any], cfg: float = 1.0, batch: int = 2, channels: int = 128
) -> Tensor:
    latent = torch.zeros(batch, channels, 4, 5)
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, seed=5),
        steps=2,
        cfg=cfg,
        sampler_name="euler",
        scheduler="simple",
        positive=positive,
        negative=condition(seed=1),
        latent_image=latent,
        disable_pbar=True,
    )


REFERENCES = [torch.ones(1, 128, 3, 6), -torch.ones(1, 128, 2, 2)]

SAMPLINGS: dict[str, dict[str, Any]] = {
    "text to image": {"positive": condition()},
    "cfg 2": {"positive": condition(), "cfg": 2.0},
    "guidance 7": {"positive": condition(guidance=7.0)},
    "two references": {"positive": condition(reference_latents=REFERENCES)},
    "references, offset": {
        "positive": condition(reference_latents=REFERENCES, reference_latents_method="offset")
    },
}


@pytest.mark.parametrize("case", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_engine_samples_like_stock_flux2(
    stock: Any, engine: EnginePatcher, case: dict[str, Any]
) -> None:
    expected, actual = sample(stock, **case), sample(engine, **case)
    assert engine.model.engine.runs > 0
    assert (expected - actual).abs().max() <= TOLERANCE * expected.abs().max()


def test_zero_timestep_references_are_refused(engine: EnginePatcher) -> None:
    positive = condition(
        reference_latents=REFERENCES, reference_latents_method="index_timestep_zero"
    )
    with pytest.raises(UnsupportedByEngineError, match="index_timestep_zero"):
        sample(engine, positive, batch=1)


def test_every_key_of_stock_flux2_is_found(stock: Any, engine: EnginePatcher) -> None:
    def shapes(model: Any) -> dict[str, torch.Size]:
        return {key: tensor.shape for key, tensor in model.model.state_dict().items()}

    assert shapes(engine) == shapes(stock)


def test_config_looks_like_stock(stock: Any, engine: EnginePatcher) -> None:
    assert type(engine.model) is type(stock.model)
    ours, theirs = engine.model.model_config.unet_config, stock.model.model_config.unet_config
    assert {key: ours[key] for key in theirs} == theirs
    assert engine.model.diffusion_model.params == stock.model.diffusion_model.params


CONCAT: dict[str, dict[str, Any]] = {
    "flux1-fill": {
        "concat_latent_image": torch.ones(1, 16, 4, 5),
        "concat_mask": torch.eye(40)[None, None],
    },
    "flux1-control": {"concat_latent_image": -torch.ones(1, 16, 6, 6)},
    "flux1-schnell": {},
}


@pytest.mark.parametrize("variant", CONCAT)
def test_engine_samples_like_stock_flux1_variants(variant: str, tmp_path: Path) -> None:
    path = save_flux(random_flux(TINY_VARIANTS[variant]), tmp_path / "tiny.safetensors")
    stock = comfy.sd.load_diffusion_model(str(path))
    engine = engine_over(comfy.sd.load_diffusion_model(str(path)))
    positive = condition(**CONCAT[variant])
    expected, actual = (sample(model, positive, channels=16) for model in (stock, engine))
    assert engine.model.engine.runs > 0
    assert (expected - actual).abs().max() <= TOLERANCE * expected.abs().max()
    if CONCAT[variant]:
        assert (sample(engine, condition(), channels=16) - actual).abs().max() > 0.01
    mm.unload_all_models()
