"""Trajectories: the sampler's schedule, the whole model's velocities, files in any order."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux_fp4.quant.calibration import Conditioning
from flux_fp4.quant.flux.model import Flux, image_ids, patchify, text_ids, unpatchify
from flux_fp4.quant.sources.source import open_source
from flux_fp4.quant.training.trajectories import (
    TrajectoryOptions,
    distinct_prompts,
    noise_levels,
    sample_trajectories,
)
from flux_fp4.quant.training.trajectory_files import PER_FILE, TrajectoryFolder
from pydantic import ValidationError
from tiny_flux import TINY, TINY_VARIANTS, random_flux, random_samples, save_flux
from torch import Tensor

OPTIONS = TrajectoryOptions(count=6, sampling_steps=4, kept=2, width=64, height=96)


def sampled(source: Path, numbers: list[int], prompts: list[Conditioning]) -> list[Tensor]:
    points = sample_trajectories(
        open_source(source), prompts, numbers, OPTIONS, "cpu", torch.float32, int
    )
    return [tensor for _, point in points for tensor in (point.latent, point.velocity)]


@pytest.fixture(scope="module")
def prompts() -> list[Conditioning]:
    return distinct_prompts(random_samples(pictures=3))


def test_schedule_is_that_of_the_sampler() -> None:
    # comfy.model_sampling.flux_time_shift(1.15, 1.0, 0.5), by hand
    middle = math.exp(1.15) / (math.exp(1.15) + 1)
    assert noise_levels(TINY, 2) == pytest.approx([1.0, middle, 0.0])
    assert noise_levels(TINY_VARIANTS["flux1-schnell"], 4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert noise_levels(TINY_VARIANTS["flux2-dev"], 2)[1] == pytest.approx(0.883, abs=1e-3)


@torch.no_grad()
def test_trajectory_is_eulers_with_the_whole_model(
    tmp_path: Path, prompts: list[Conditioning]
) -> None:
    model = random_flux()
    source = save_flux(model, tmp_path / "tiny.safetensors", dtype=torch.float32)
    every = OPTIONS.model_copy(update={"kept": OPTIONS.sampling_steps})
    points = sample_trajectories(
        open_source(source), prompts, [4], every, "cpu", torch.float32, int
    )
    assert [prompt for prompt, _ in points] == [1] * OPTIONS.sampling_steps
    levels = noise_levels(TINY, OPTIONS.sampling_steps)
    x = points[0][1].latent
    assert x.shape == (1, 16, 12, 8)
    for (_, point), t, following in zip(points, levels[:-1], levels[1:], strict=True):
        assert point.t == t
        torch.testing.assert_close(point.latent, x, rtol=0, atol=1e-4)
        v = velocity(model, point.latent, t, prompts[1])
        torch.testing.assert_close(point.velocity, v, rtol=0, atol=1e-4)
        x = x + (following - t) * v


def velocity(model: Flux, x: Tensor, t: float, prompt: Conditioning) -> Tensor:
    assert prompt.guidance is not None
    patches = model(
        patchify(x),
        image_ids(*x.shape[-2:]),
        prompt.context,
        text_ids(prompt.context.shape[1], TINY),
        torch.tensor([t]),
        prompt.pooled,
        torch.tensor([prompt.guidance]),
    )
    return unpatchify(patches, *x.shape[-2:])


def test_trajectories_do_not_depend_on_their_company(
    source: Path, prompts: list[Conditioning]
) -> None:
    together = sampled(source, [0, 1, 2], prompts)
    alone = [tensor for number in range(3) for tensor in sampled(source, [number], prompts)]
    # sorted by step there, by trajectory here
    assert len(together) == len(alone) == 3 * 2 * OPTIONS.kept
    for tensor in alone:
        assert any(torch.allclose(tensor, other, atol=1e-5) for other in together)
    assert not torch.allclose(alone[0], alone[2 * OPTIONS.kept])


def test_points_are_spread_over_the_schedule(source: Path, prompts: list[Conditioning]) -> None:
    levels = noise_levels(TINY, OPTIONS.sampling_steps)
    points = sample_trajectories(
        open_source(source), prompts, range(6), OPTIONS, "cpu", torch.float32, int
    )
    times = [point.t for _, point in points]
    assert sum(t >= levels[1] for t in times) == sum(t <= levels[2] for t in times) == 6
    assert len(set(times)) == OPTIONS.sampling_steps


def test_prompts_count_once(prompts: list[Conditioning]) -> None:
    samples = random_samples(pictures=3, timesteps=4)
    copies = [
        replace(sample, conditioning=replace(sample.conditioning)) for sample in samples.samples
    ]
    found = distinct_prompts(replace(samples, samples=tuple(copies)))
    assert len(found) == 3
    assert all(torch.equal(a.context, b.context) for a, b in zip(found, prompts, strict=True))


@pytest.mark.parametrize(
    "changes", [{"kept": 5}, {"width": 100}, {"count": 1}, {"height": 0}], ids=str
)
def test_impossible_options_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        TrajectoryOptions(**{**OPTIONS.model_dump(), **changes})


@pytest.fixture
def folder(tmp_path: Path, prompts: list[Conditioning]) -> TrajectoryFolder:
    return TrajectoryFolder(tmp_path, "source", prompts, OPTIONS, torch.float32)


def test_files_give_back_what_was_sampled(
    source: Path, prompts: list[Conditioning], folder: TrajectoryFolder
) -> None:
    assert (folder.files, list(folder.numbers(0))) == (1, list(range(OPTIONS.count)))
    assert not folder.holds(0)
    points = sample_trajectories(
        open_source(source), prompts, folder.numbers(0), OPTIONS, "cpu", torch.float32, int
    )
    folder.write(0, points)
    folder.wait(pytest.fail)
    read = folder.points()
    assert len(read) == len(points) == OPTIONS.count * OPTIONS.kept
    for index, (prompt, point) in enumerate(points):
        assert (read.prompts[index], read[index].t) == (prompt, point.t)
        assert torch.equal(read[index].latent, point.latent)
        assert torch.equal(read[index].velocity, point.velocity)
        assert torch.equal(read[index].conditioning.context, prompts[prompt].context)


@pytest.mark.parametrize("damage", ["cut", "other content"])
def test_damaged_files_are_made_again(
    source: Path, prompts: list[Conditioning], folder: TrajectoryFolder, damage: str
) -> None:
    points = sample_trajectories(
        open_source(source), prompts, [0], OPTIONS, "cpu", torch.float32, int
    )
    folder.write(0, points)
    path = folder.path / "00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-10] if damage == "cut" else data.replace(b"source", b"sourcf"))
    assert not folder.holds(0)


def test_many_trajectories_take_several_files(tmp_path: Path, prompts: list[Conditioning]) -> None:
    options = OPTIONS.model_copy(update={"count": 2 * PER_FILE + 1})
    folder = TrajectoryFolder(tmp_path, "source", prompts, options, torch.float32)
    numbers = [number for file in range(folder.files) for number in folder.numbers(file)]
    assert numbers == list(range(options.count))
