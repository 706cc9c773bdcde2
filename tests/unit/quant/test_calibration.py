from __future__ import annotations

import pytest
import torch
from flux_fp4.quant.calibration import (
    Conditioning,
    embedded_samples,
    rectified_flow_samples,
)
from flux_fp4.quant.errors import CalibrationError, NotFiniteError
from tiny_flux import TINY, random_flux, random_samples

PROMPT = Conditioning(torch.ones(1, 4, 96), torch.ones(1, 64), 3.5)


def test_samples_lie_on_the_rectified_flow_path() -> None:
    latents = torch.full((1, 16, 4, 4), 2.0)
    samples = rectified_flow_samples(latents, [PROMPT], timesteps=4, seed=7).samples
    assert [sample.t for sample in samples] == [0.125, 0.375, 0.625, 0.875]
    generator = torch.Generator().manual_seed(7)
    for sample in samples:
        noise = torch.randn(1, 16, 4, 4, generator=generator)
        expected = (1 - sample.t) * latents + sample.t * noise
        assert torch.equal(sample.latent, expected)


def test_every_latent_and_every_prompt_is_used() -> None:
    other = Conditioning(2 * PROMPT.context, PROMPT.pooled, 1.0)
    samples = rectified_flow_samples(torch.zeros(3, 16, 4, 4), [PROMPT, other], 2, 0).samples
    assert len(samples) == 6
    assert [sample.conditioning.guidance for sample in samples] == [3.5, 3.5, 1.0, 1.0, 3.5, 3.5]


def test_digest_tells_every_input_apart() -> None:
    latents = torch.zeros(1, 16, 4, 4)
    reference = rectified_flow_samples(latents, [PROMPT], 2, 0).digest()
    assert reference == rectified_flow_samples(latents.clone(), [PROMPT], 2, 0).digest()
    others = [
        rectified_flow_samples(latents + 1e-3, [PROMPT], 2, 0),
        rectified_flow_samples(latents, [PROMPT], 3, 0),
        rectified_flow_samples(latents, [PROMPT], 2, 1),
        rectified_flow_samples(latents, [Conditioning(PROMPT.context, None, 3.5)], 2, 0),
        rectified_flow_samples(latents, [Conditioning(PROMPT.context, PROMPT.pooled, 4.0)], 2, 0),
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


@pytest.mark.parametrize(
    ("latents", "prompt", "limit"),
    [
        (torch.zeros(1, 32, 4, 4), PROMPT, "it takes 16"),
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
