"""Two models along one trajectory, in ComfyUI's own sampling of the small trained FLUX."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui
from torch import Tensor

import_comfyui()

import comfy.model_management as mm  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402
from engine_sampling import condition, sample, stock_flux  # noqa: E402
from flux_fp4.nodes.errors import SamplerNotComparableError  # noqa: E402
from flux_fp4.nodes.trajectories import Sampling  # noqa: E402
from flux_fp4.quant.flux.config import block_linears  # noqa: E402
from flux_fp4.quant.nvfp4 import fake_quantize_weight  # noqa: E402
from flux_fp4.quant.quality.trajectory import TrajectoryReport, trajectory_report  # noqa: E402

STEPS = 4


@pytest.fixture(autouse=True)
def inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield
    mm.unload_all_models()


@pytest.fixture(scope="module")
def stock() -> Any:
    return stock_flux()


def sampling(sampler: str = "euler", latent: Tensor | None = None, **more: Any) -> Sampling:
    samples = torch.zeros(1, 16, 8, 8) if latent is None else latent
    return Sampling(condition(), {"samples": samples, **more}, 5, STEPS, sampler, "simple")


def compared(run: Sampling, reference: Any, tested: Any) -> TrajectoryReport:
    first, points = run.recorded(reference, lambda: None)
    denoised = run.predictions_at(tested, points, lambda: None)
    second, own = run.recorded(tested, lambda: None)
    run.check_equal_evaluations(len(points), len(own))
    return trajectory_report(points, denoised, [x for x, _, _ in own], first, second)


def with_velocity_times(model: Any, factor: float) -> Any:
    def scaled(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        return factor * executor(*args, **kwargs)

    changed = model.clone()
    changed.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", scaled)
    return changed


def in_nvfp4() -> Any:
    """Stock FLUX with the weights of its blocks rounded to NVFP4."""
    model = stock_flux()
    flux = model.model.diffusion_model
    names = [f"double_blocks.{i}" for i in range(len(flux.double_blocks))]
    names += [f"single_blocks.{i}" for i in range(len(flux.single_blocks))]
    for block in names:
        for linear in block_linears(block):
            weight = flux.get_submodule(f"{block}.{linear}").weight
            weight.data.copy_(fake_quantize_weight(weight.data.float()))
    return model


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_ancestral", "dpmpp_2m"])
def test_model_against_itself_is_exact(stock: Any, sampler: str) -> None:
    report = compared(sampling(sampler), stock, stock)
    assert len(report.steps) >= STEPS
    assert {step.velocity_sqnr_db for step in report.steps} == {math.inf}
    assert {step.drift_sqnr_db for step in report.steps} == {math.inf}
    assert report.latent_psnr_db == math.inf


def test_batch_with_a_soft_noise_mask_is_exact_against_itself(stock: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(2, 16, 8, 8, generator=generator)
    mask = torch.rand(1, 64, 64, generator=generator)
    report = compared(sampling(latent=latent, noise_mask=mask), stock, stock)
    assert {step.velocity_sqnr_db for step in report.steps} == {math.inf}


def test_latents_are_those_of_ksampler(stock: Any) -> None:
    run = Sampling(condition(), {"samples": torch.zeros(1, 16, 8, 8)}, 5, 3, "euler", "simple")
    latents, points = run.recorded(stock, lambda: None)
    assert torch.equal(latents, sample(stock))
    assert len(points) == 3


def test_velocity_of_nine_tenths_is_20_db(stock: Any) -> None:
    report = compared(sampling(), stock, with_velocity_times(stock, 0.9))
    for step in report.steps:
        assert step.velocity_sqnr_db == pytest.approx(20.0, abs=1e-3)
    drift = [step.drift_sqnr_db for step in report.steps]
    assert drift[0] == math.inf
    assert all(math.isfinite(value) for value in drift[1:])
    assert math.isfinite(report.latent_psnr_db)


def test_nvfp4_weights_cost_what_is_known(stock: Any) -> None:
    """The recipe's velocity SQNR on this model is near 15 dB, activations included."""
    report = compared(sampling(), stock, in_nvfp4())
    for step in report.steps:
        assert 10 < step.velocity_sqnr_db < 35, step


def test_sampler_that_chooses_its_steps_is_refused() -> None:
    with pytest.raises(SamplerNotComparableError, match="'euler' evaluated") as caught:
        sampling().check_equal_evaluations(30, 33)
    assert (caught.value.reference, caught.value.tested) == (30, 33)
