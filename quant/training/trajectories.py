"""Trajectories of the original: what its sampler sees and predicts on the way from noise.

Distillation needs no pictures: the original makes its own training data by sampling, as in
LLM-QAT (Liu et al. 2023, arXiv:2305.17888) with a language model. Euler's method on the rectified
flow is ``x <- x + (t_next - t) * v(x, t)``; every few steps ``x``, ``t`` and ``v`` are kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..calibration import CalibrationSample, CalibrationSet, Conditioning, digest_conditioning
from ..errors.calibration import CalibrationError
from ..flux.config import FluxConfig
from ..sources.source import FluxSource
from .teacher import teacher_velocities

PIXELS_PER_TOKEN = 16
"""Along one side, in every FLUX model: 8 by the VAE and 2 by patches in FLUX.1, 16 by the VAE of
FLUX.2."""

_SHIFT = 1.15
_SHIFTS = {"flux1-schnell": 0.0, "flux2-dev": 2.02, "flux2-klein": 2.02}
"""ComfyUI 0.30, ``supported_models.py`` (``sampling_settings``) and ``ModelSamplingFlux``: what a
sampler does without a node that changes it. Schnell's is none at all."""


class TrajectoryOptions(BaseModel):
    """What is sampled from the original.

    Attributes:
        count: Trajectories, one noise and one prompt each; prompts take turns.
        sampling_steps: Steps of Euler's method from noise to picture.
        kept: Points kept of each trajectory: one at random from each of so many equal parts.
        width: Of the pictures in pixels. Conditioning with latents of its own has their size.
        height: As ``width``.
        seed: Of noise and choice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(default=256, ge=2, le=1_000_000)
    sampling_steps: int = Field(default=20, ge=1, le=1000)
    kept: int = Field(default=4, ge=1, le=1000)
    width: int = Field(default=1024, ge=32, le=4096, multiple_of=PIXELS_PER_TOKEN)
    height: int = Field(default=1024, ge=32, le=4096, multiple_of=PIXELS_PER_TOKEN)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _has_so_many_steps(self) -> TrajectoryOptions:
        if self.kept > self.sampling_steps:
            raise ValueError(f"{self.kept} points of {self.sampling_steps} steps cannot be kept")
        return self


def noise_levels(config: FluxConfig, steps: int) -> list[float]:
    """Return the sampler's times: ``steps`` of them from 1 on, and 0 behind them.

    Equal steps, shifted towards noise as in ComfyUI 0.30 (``model_sampling.flux_time_shift``).
    """
    shift = math.exp(_SHIFTS.get(config.variant, _SHIFT))
    equal = [1 - step / steps for step in range(steps)]
    return [*(shift / (shift + 1 / t - 1) for t in equal), 0.0]


def distinct_prompts(calibration: CalibrationSet) -> list[Conditioning]:
    """Return every conditioning of some samples once, whatever pictures it was used with.

    Raises:
        CalibrationError: There is one only; training and judging need one each.
    """
    distinct: dict[str, Conditioning] = {}
    for sample in calibration.samples:
        distinct.setdefault(prompts_digest([sample.conditioning]), sample.conditioning)
    if len(distinct) < 2:
        raise CalibrationError(
            "distillation has 1 prompt", "it needs 2 or more, one of them to be judged by"
        )
    return list(distinct.values())


def prompts_digest(prompts: Iterable[Conditioning]) -> str:
    """Return a blake3 digest of everything that the model can see of some prompts."""
    digest = blake3()
    for prompt in prompts:
        digest.update(repr((prompt.guidance, prompt.reference_method)).encode())
        digest_conditioning(digest, prompt)
    return digest.hexdigest()


def sample_trajectories(
    source: FluxSource,
    prompts: Sequence[Conditioning],
    numbers: Iterable[int],
    options: TrajectoryOptions,
    device: str,
    dtype: torch.dtype,
    heartbeat: Callable[[], None],
) -> list[tuple[int, CalibrationSample]]:
    """Sample some trajectories side by side.

    What a trajectory holds depends on its number and the options alone, but for rounding of the
    machine.

    Args:
        source: The original.
        prompts: All of them.
        numbers: Of the trajectories.
        options: What to sample.
        device: Where to compute.
        dtype: Type to compute in.
        heartbeat: Called before each block of each step; may raise to cancel.

    Returns:
        The points kept, each with the number of its prompt.
    """
    chosen = list(numbers)
    generators = [_generator(options.seed, number) for number in chosen]
    places = [number % len(prompts) for number in chosen]
    latents = [
        _noise(prompts[place], source.config, options, generator)
        for place, generator in zip(places, generators, strict=True)
    ]
    kept = [_kept_steps(options, generator) for generator in generators]
    levels = noise_levels(source.config, options.sampling_steps)
    points: list[tuple[int, CalibrationSample]] = []
    for step in range(options.sampling_steps):
        samples = [
            CalibrationSample(latent, levels[step], prompts[place], torch.zeros_like(latent))
            for latent, place in zip(latents, places, strict=True)
        ]
        velocities = teacher_velocities(source, samples, device, dtype, heartbeat)
        for row, velocity in enumerate(velocities):
            if step in kept[row]:
                points.append((places[row], replace(samples[row], velocity=velocity)))
            latents[row] = latents[row] + (levels[step + 1] - levels[step]) * velocity
    return points


def _generator(seed: int, number: int) -> torch.Generator:
    digest = blake3(f"{seed}:{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _noise(
    prompt: Conditioning, config: FluxConfig, options: TrajectoryOptions, generator: torch.Generator
) -> Tensor:
    # a token is one patch of the latent
    height, width = (
        size // PIXELS_PER_TOKEN * config.patch_size for size in (options.height, options.width)
    )
    if prompt.concat is not None:
        height, width = prompt.concat.shape[-2:]
    return torch.randn(1, config.out_channels, height, width, generator=generator)


def _kept_steps(options: TrajectoryOptions, generator: torch.Generator) -> set[int]:
    """Choose one step of each equal part of the schedule."""
    bounds = [part * options.sampling_steps // options.kept for part in range(options.kept + 1)]
    return {
        int(torch.randint(low, high, (), generator=generator))
        for low, high in itertools.pairwise(bounds)
    }
