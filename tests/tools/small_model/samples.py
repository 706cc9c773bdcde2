"""Digits with their prompts, and calibration samples of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import small_model_files
from flux_fp4.quant.calibration import CalibrationSet, Conditioning, rectified_flow_samples
from torch import Tensor

from .autoencoder import latents_of
from .conditioning import encode_prompts
from .digits import PROMPTS, load_ink

TIMESTEPS, GUIDANCE = 8, 3.5
TEXT_TOKENS = 77
"""Of the encoder."""


@dataclass(frozen=True)
class Digits:
    """What samples are made of.

    Attributes:
        ink: ``[N, 1, 64, 64]``.
        labels: ``[N]``.
        latents: ``[N, 16, 8, 8]``.
        context: Text states of every prompt ``[P, 77, 768]``.
        pooled: ``[P, 768]``.
    """

    ink: Tensor
    labels: Tensor
    latents: Tensor
    context: Tensor
    pooled: Tensor

    @classmethod
    def load(cls) -> Digits:
        """Encode every digit and every prompt."""
        ink, labels = load_ink()
        context, pooled = encode_prompts(small_model_files.text_encoder(), PROMPTS)
        return cls(ink, labels, latents_of(ink), context, pooled)

    def samples(
        self, pictures: Sequence[int], seed: int, text_tokens: int = TEXT_TOKENS
    ) -> CalibrationSet:
        """Return the samples of some pictures with the first text tokens of their prompts."""
        chosen = list(pictures)
        prompts = [
            Conditioning(
                self.context[label][None, :text_tokens], self.pooled[label][None], GUIDANCE
            )
            for label in self.labels[chosen]
        ]
        return rectified_flow_samples(self.latents[chosen], prompts, TIMESTEPS, seed)
