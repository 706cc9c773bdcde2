"""Sampling two models with ComfyUI's own machinery, recording what each predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .errors import SamplerNotComparableError

Point = tuple[Tensor, Tensor, Tensor]
"""``x_t``, sigma ``[n]`` and the denoised latents that a model predicts there; in main memory."""

StepDone = Callable[[], None]


@dataclass(frozen=True)
class Sampling:
    """Everything but the model.

    Attributes:
        positive: CONDITIONING; without classifier-free guidance, as FLUX is sampled.
        latent: LATENT to start from.
        seed: Of the noise.
        steps: Of the schedule.
        sampler_name: As in KSampler.
        scheduler: As in KSampler.
    """

    positive: list[Any]
    latent: dict[str, Any]
    seed: int
    steps: int
    sampler_name: str
    scheduler: str

    def recorded(self, model: ModelPatcher, step_done: StepDone) -> tuple[Tensor, list[Point]]:
        """Sample; return the final latents and every evaluation."""
        points: list[Point] = []

        def record(executor: Any, x: Tensor, sigma: Tensor, *rest: Any) -> Tensor:
            # Samplers may go on in the same memory.
            before = x.to("cpu", torch.float32, copy=True)
            denoised: Tensor = executor(x, sigma, *rest)
            points.append((before, sigma.float().cpu(), denoised.float().cpu().clone()))
            return denoised

        watched = model.clone()
        watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "flux_fp4_compare", record)
        sampler = comfy.samplers.sampler_object(self.sampler_name)
        return self.sample(watched, sampler, step_done), points

    def predictions_at(
        self, model: ModelPatcher, points: Sequence[Point], step_done: StepDone
    ) -> list[Tensor]:
        """Return the denoised latents of a model at points where another one was."""
        found: list[Tensor] = []

        def visit(
            model_k: Any, noise: Tensor, sigmas: Tensor, extra_args: Any, **_rest: Any
        ) -> Tensor:
            for x, sigma, _ in points:
                # Past the handling of a noise mask: these latents have gone through it.
                denoised = model_k.inner_model(
                    x.to(noise),
                    sigma.to(noise.device),
                    model_options=extra_args["model_options"],
                    seed=extra_args["seed"],
                )
                found.append(denoised.float().cpu())
                step_done()
            return noise

        self.sample(model, comfy.samplers.KSAMPLER(visit), lambda: None)
        return found

    def sample(self, model: ModelPatcher, sampler: Any, step_done: StepDone) -> Tensor:
        """Sample with a sampler object; return the final latents."""
        start = comfy.sample.fix_empty_latent_channels(
            model,
            self.latent["samples"],
            self.latent.get("downscale_ratio_spacial"),
            self.latent.get("downscale_ratio_temporal"),
        )
        noise = comfy.sample.prepare_noise(start, self.seed, self.latent.get("batch_index"))
        schedule = comfy.samplers.KSampler(
            model, self.steps, model.load_device, self.sampler_name, self.scheduler
        )
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": self.positive})
        samples: Tensor = guider.sample(
            noise,
            start,
            sampler,
            schedule.sigmas,
            denoise_mask=self.latent.get("noise_mask"),
            callback=lambda *_: step_done(),
            disable_pbar=True,
            seed=self.seed,
        )
        return samples.float().cpu()

    def check_equal_evaluations(self, reference: int, tested: int) -> None:
        """Check that both trajectories have the same steps.

        Raises:
            SamplerNotComparableError: The sampler chose them by what the model said.
        """
        if reference != tested:
            raise SamplerNotComparableError(self.sampler_name, reference, tested)
