from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flux_fp4.quant.calibration import (
    Conditioning,
    embedded_samples,
    rectified_flow_samples,
)
from flux_fp4.quant.errors.calibration import CalibrationError, NotFiniteError
from flux_fp4.quant.flux.model import patchify, unpatchify
from tiny_flux import TINY, TINY_FLUX2, TINY_VARIANTS, random_flux, random_samples

PROMPT = Conditioning(torch.ones(1, 4, 96), torch.ones(1, 64), 3.5)


def test_samples_lie_on_the_rectified_flow_path() -> None:
    latents = torch.full((1, 16, 4, 4), 2.0)
    calibration = rectified_flow_samples(latents, [PROMPT], timesteps=4, seed=7)
    assert (calibration.seed, calibration.timesteps) == (7, 4)
    samples = calibration.samples
    assert [sample.t for sample in samples] == [0.125, 0.375, 0.625, 0.875]
    generator = torch.Generator().manual_seed(7)
    for sample in samples:
        noise = torch.randn(1, 16, 4, 4, generator=generator)
        expected = (1 - sample.t) * latents + sample.t * noise
        assert torch.equal(sample.latent, expected)
        assert torch.equal(sample.velocity, noise - latents)


def test_velocity_has_the_patches_that_the_model_predicts() -> None:
    for variant, config in TINY_VARIANTS.items():
        sample = random_samples(config).samples[0]
        patches = sample.velocity_patches(config.patch_size)
        assert torch.equal(unpatchify(patches, 6, 8, config.patch_size), sample.velocity), variant


def test_every_picture_keeps_its_own_concat_and_reference_rows() -> None:
    rows = torch.arange(3.0)[:, None, None, None].expand(3, 16, 4, 4)
    prompt = replace(PROMPT, concat=rows, references=(10 * rows[:2],))
    samples = rectified_flow_samples(rows, [prompt], 1, 0).samples
    joined = [sample.conditioning.concat.unique().tolist() for sample in samples]  # type: ignore[union-attr]
    references = [sample.conditioning.references[0].unique().tolist() for sample in samples]
    assert joined == [[0], [1], [2]]
    assert references == [[0], [10], [0]]


def test_every_latent_and_every_prompt_is_used() -> None:
    other = Conditioning(2 * PROMPT.context, PROMPT.pooled, 1.0)
    samples = rectified_flow_samples(torch.zeros(3, 16, 4, 4), [PROMPT, other], 2, 0).samples
    assert len(samples) == 6
    assert [sample.conditioning.guidance for sample in samples] == [3.5, 3.5, 1.0, 1.0, 3.5, 3.5]


def test_digest_tells_every_input_apart() -> None:
    latents = torch.zeros(1, 16, 4, 4)
    reference = rectified_flow_samples(latents, [PROMPT], 2, 0).digest()
    assert reference == rectified_flow_samples(latents.clone(), [PROMPT], 2, 0).digest()
    reference_latent = torch.ones(1, 16, 4, 4)
    prompts = [
        replace(PROMPT, pooled=None),
        replace(PROMPT, guidance=4.0),
        replace(PROMPT, concat=torch.zeros(1, 16, 4, 4)),
        replace(PROMPT, references=(reference_latent,)),
        replace(PROMPT, references=(reference_latent, reference_latent)),
        replace(PROMPT, references=(reference_latent,), reference_method="uxo"),
    ]
    others = [
        rectified_flow_samples(latents + 1e-3, [PROMPT], 2, 0),
        rectified_flow_samples(latents, [PROMPT], 3, 0),
        rectified_flow_samples(latents, [PROMPT], 2, 1),
        *(rectified_flow_samples(latents, [prompt], 2, 0) for prompt in prompts),
    ]
    digests = {samples.digest() for samples in others}
    assert len(digests) == len(others)
    assert reference not in digests


@pytest.mark.parametrize(
    ("latents", "prompts", "timesteps"),
    [(0, 1, 1), (1, 0, 1), (1, 1, 0)],
    ids=["no_latents", "no_prompts", "no_timesteps"],
)
def test_nothing_to_calibrate_with_is_refused(latents: int, prompts: int, timesteps: int) -> None:
    with pytest.raises(CalibrationError, match="at least one of each"):
        rectified_flow_samples(torch.zeros(latents, 16, 4, 4), [PROMPT] * prompts, timesteps, 0)


def test_latent_with_nan_is_refused() -> None:
    latents = torch.zeros(2, 16, 4, 4)
    latents[1, 0, 0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="latent of calibration sample 1"):
        rectified_flow_samples(latents, [PROMPT], 1, 0)


def test_embedding_has_one_token_per_patch_text_first() -> None:
    with torch.no_grad():
        states = embedded_samples(random_samples(), random_flux(), TINY)
    assert len(states) == 4
    assert states[0].img.shape == (1, 12, 256)
    assert states[0].txt is not None
    assert states[0].txt.shape == (1, 10, 256)
    assert states[0].cos.shape == (1, 22, 64)
    # text has position zero
    assert torch.equal(states[0].sin[:, :10], torch.zeros(1, 10, 64))


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_every_variant_embeds_its_samples(variant: str) -> None:
    config = TINY_VARIANTS[variant]
    with torch.no_grad():
        states = embedded_samples(random_samples(config), random_flux(config), config)
    tokens = 48 if config.shared_modulation else 12
    for state in states:
        assert state.img.shape == (1, tokens, 256)
        assert state.cos.shape == (1, 10 + tokens, 64)
        assert (state.shared_mods is not None) == config.shared_modulation


def test_flux2_counts_text_tokens() -> None:
    with torch.no_grad():
        state = embedded_samples(random_samples(TINY_FLUX2), random_flux(TINY_FLUX2), TINY_FLUX2)[0]
    # the last axis has the last 16 frequencies, the fastest of them turns by one radian a token
    expected = torch.arange(10.0).sin()
    assert torch.allclose(state.sin[0, :10, 48], expected, atol=1e-6)
    assert torch.equal(state.sin[0, :10, :48], torch.zeros(10, 48))


def test_reference_tokens_follow_those_of_the_picture() -> None:
    reference = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(2))
    prompt = replace(PROMPT, references=(reference,))
    samples = rectified_flow_samples(torch.ones(1, 16, 4, 4), [prompt], 1, 0)
    model = random_flux()
    with torch.no_grad():
        (state,) = embedded_samples(samples, model, TINY)
        expected = model.img_in(patchify(reference))
    assert state.img.shape[1] == 4 + 6
    assert torch.allclose(state.img[:, 4:], expected, atol=1e-5)
    # 'offset', FLUX.1's default, puts references on plane 1: the first axis turns by one radian
    assert torch.allclose(state.sin[0, 4 + 4 :, 0], torch.tensor(1.0).sin())


def test_extra_channels_come_after_the_latent() -> None:
    config = TINY_VARIANTS["flux1-fill"]
    generator = torch.Generator().manual_seed(3)
    concat = torch.randn(1, 80, 4, 4, generator=generator)
    samples = rectified_flow_samples(
        torch.ones(1, 16, 4, 4), [replace(PROMPT, concat=concat)], 1, 0
    )
    model = random_flux(config)
    with torch.no_grad():
        (state,) = embedded_samples(samples, model, config)
        expected = model.img_in(patchify(torch.cat((samples.samples[0].latent, concat), dim=1)))
    assert torch.allclose(state.img, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "change", "limit"),
    [
        ("flux1-fill", {}, "adds 0 channels .* 'flux1-fill' takes 80 .*InpaintModelConditioning"),
        (
            "flux1-control",
            {"concat": torch.ones(1, 80, 4, 4)},
            "adds 80 channels .* takes 16 .*InstructPixToPixConditioning",
        ),
        ("flux1-dev", {"concat": torch.ones(1, 16, 4, 4)}, "adds 16 .* 'flux1-dev' takes 0"),
        (
            "flux1-dev",
            {"references": (torch.ones(1, 128, 4, 4),)},
            "reference latent has 128 channels; .*'flux1-dev' takes 16",
        ),
        (
            "flux1-fill",
            {"concat": torch.ones(1, 80, 4, 4), "references": (torch.ones(1, 16, 4, 4),)},
            "reference latent has 16 channels; .*'flux1-fill' takes 96",
        ),
        (
            "flux1-dev",
            {"reference_method": "index_timestep_zero"},
            "method is 'index_timestep_zero'; engines take offset, index, uxo",
        ),
    ],
    ids=["fill", "control", "text_to_image", "flux2_reference", "fill_reference", "method"],
)
def test_conditioning_of_another_variant_is_refused(
    variant: str, change: dict[str, Any], limit: str
) -> None:
    samples = rectified_flow_samples(torch.ones(1, 16, 4, 4), [replace(PROMPT, **change)], 1, 0)
    config = TINY_VARIANTS[variant]
    with pytest.raises(CalibrationError, match=limit):
        embedded_samples(samples, random_flux(config), config)


@pytest.mark.parametrize(
    ("latents", "prompt", "limit"),
    [
        (torch.zeros(1, 32, 4, 4), PROMPT, "have 32 channels; 'flux1-dev' takes 16"),
        (
            torch.zeros(1, 16, 4, 4),
            Conditioning(torch.ones(1, 4, 768), PROMPT.pooled, 1.0),
            "takes 96",
        ),
        (
            torch.zeros(1, 16, 4, 4),
            Conditioning(PROMPT.context, torch.ones(1, 32), 1.0),
            "takes 64",
        ),
    ],
    ids=["channels", "text_width", "pooled_width"],
)
def test_samples_of_another_model_are_refused(
    latents: torch.Tensor, prompt: Conditioning, limit: str
) -> None:
    samples = rectified_flow_samples(latents, [prompt], 1, 0)
    with pytest.raises(CalibrationError, match=limit):
        embedded_samples(samples, random_flux(), TINY)
