"""A MODEL whose modulation Linears are stored in FP8 or NVFP4, with torch as the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui
from flux_fp4.quant.sqnr import sqnr_db
from small_model_files import DATA, DIFFUSION_MODEL
from torch import Tensor

import_comfyui()

import comfy.model_management as mm  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
from comfy.quant_ops import QuantizedTensor  # noqa: E402
from flux_fp4.nodes.engine_patcher import EnginePatcher  # noqa: E402
from torch_engine import engine_over  # noqa: E402

MIN_DB = {"fp8": 30.0, "nvfp4": 15.0}
"""Of the latent after three steps with a trained model."""


def stock_flux() -> Any:
    return comfy.sd.load_diffusion_model(str(DATA / DIFFUSION_MODEL))


@pytest.fixture(params=["fp8", "nvfp4"])
def modulation(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "dynamic VRAM"])
def engine(request: pytest.FixtureRequest, modulation: Any) -> Any:
    yield engine_over(stock_flux(), request.param, modulation)
    mm.unload_all_models()


@pytest.fixture(autouse=True)
def inference_mode() -> Any:
    with torch.inference_mode():
        yield


def sample(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, 77, 768, generator=generator)
    condition = [[context, {"pooled_output": torch.randn(1, 768, generator=generator)}]]
    latent = torch.zeros(1, 16, 8, 8)
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, seed=5),
        steps=3,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        positive=condition,
        negative=condition,
        latent_image=latent,
        disable_pbar=True,
    )


def modulation_lora(strength: float) -> dict[str, Any]:
    weight = torch.randn(384, 128, generator=torch.Generator().manual_seed(1))
    return {"diffusion_model.single_blocks.0.modulation.lin.weight": ("diff", (strength * weight,))}


def test_it_samples_nearly_like_stock_flux(engine: EnginePatcher, modulation: str) -> None:
    db = sqnr_db(sample(stock_flux()), sample(engine))
    assert MIN_DB[modulation] <= db < 60, f"{db:.1f} dB, at least {MIN_DB[modulation]} expected"


def torch_bytes(patcher: EnginePatcher) -> int:
    return sum(weight.nbytes for weight in patcher.model.parameters())


def test_weights_stay_quantized_in_memory(engine: EnginePatcher) -> None:
    sample(engine)
    block = engine.model.diffusion_model.double_blocks[0]
    assert isinstance(block.img_mod.lin.weight, QuantizedTensor)
    # fp8 takes a quarter of fp32, nvfp4 less
    saved = torch_bytes(engine_over(stock_flux())) - torch_bytes(engine)
    modulation_bytes = 4 * sum(
        weight.numel()
        for name, weight in engine.model.named_parameters()
        if name.endswith("lin.weight")
    )
    assert saved >= 0.7 * modulation_bytes


def test_lora_on_quantized_modulation_works(engine: EnginePatcher) -> None:
    stock, patched = stock_flux(), engine.clone()
    plain = sample(engine)
    stock.add_patches(modulation_lora(0.05))
    patched.add_patches(modulation_lora(0.05))
    expected, actual = sample(stock), sample(patched)
    assert sqnr_db(expected, actual) > sqnr_db(expected, plain) + 3
    assert torch.equal(sample(engine), plain)


def test_it_can_be_unloaded_and_loaded_again(engine: EnginePatcher) -> None:
    before = sample(engine)
    mm.unload_all_models()
    assert not engine.model.engine.loaded
    assert torch.equal(sample(engine), before)
