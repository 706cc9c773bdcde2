"""Sample the small model through ComfyUI's own loaders and sampler, and judge the pictures."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import comfy.sample
import comfy.sd
import comfy.utils
import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC
from torch import Tensor

from .classifier import classifier_inputs
from .conditioning import encode_prompts
from .digits import IMAGE_SIZE, PROMPTS, ink_of, load_ink

logger = logging.getLogger(__name__)

# What the example workflows use: KSampler with its smallest settings for FLUX.
STEPS = 20
CFG = 1.0
SAMPLER = "euler"
SCHEDULER = "simple"
GUIDANCE = 3.5

SEED = 1234
PER_PROMPT = 50
SHEET_COLUMNS = 16


@dataclass(frozen=True)
class Evaluation:
    """How well the pictures match their prompts.

    Attributes:
        classifier_accuracy: five-fold cross-validation of the classifier on real digits.
        accuracy: share of sampled pictures that the classifier reads as the digit of the prompt.
        per_prompt: the same for each prompt.
    """

    classifier_accuracy: float
    accuracy: float
    per_prompt: tuple[float, ...]


@torch.no_grad()
def sample_pictures(
    transformer: Path, autoencoder: Path, text_encoder: Path, per_prompt: int
) -> Tensor:
    """Sample every prompt with the seeds ``SEED``, ``SEED + 1``, ...

    Returns:
        Pictures in [0, 1] ``[prompts, per_prompt, 3, 64, 64]``.
    """
    context, pooled = encode_prompts(text_encoder, PROMPTS)
    model = comfy.sd.load_diffusion_model(str(transformer))
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(autoencoder)))
    empty = torch.zeros(per_prompt, 16, IMAGE_SIZE // 8, IMAGE_SIZE // 8)
    rows = []
    for prompt in range(len(PROMPTS)):
        options = {"pooled_output": pooled[prompt : prompt + 1], "guidance": GUIDANCE}
        conditioning = [[context[prompt : prompt + 1], options]]
        seed = SEED + prompt
        noise = comfy.sample.prepare_noise(empty, seed)
        latents = comfy.sample.sample(
            model, noise, STEPS, CFG, SAMPLER, SCHEDULER, conditioning, conditioning, empty,
            disable_pbar=True, seed=seed,
        )  # fmt: skip
        rows.append(vae.decode(latents).movedim(-1, 1))
    return torch.stack(rows)


def judge(pictures: Tensor) -> Evaluation:
    """Classify pictures ``[prompts, per_prompt, 3, H, W]`` with a classifier of real digits."""
    ink, labels = load_ink()
    classifier = SVC()
    scores = cross_val_score(classifier, classifier_inputs(ink), labels.numpy(), cv=5)
    classifier.fit(classifier_inputs(ink), labels.numpy())
    found = classifier.predict(classifier_inputs(ink_of(pictures.flatten(0, 1))))
    expected = np.arange(len(PROMPTS))[:, None]
    right = found.reshape(len(PROMPTS), -1) == expected
    return Evaluation(float(scores.mean()), float(right.mean()), tuple(right.mean(axis=1).tolist()))


def save_sheet(pictures: Tensor, path: Path) -> None:
    """Save a contact sheet: one row per prompt, one column per picture."""
    rows = pictures[:, :SHEET_COLUMNS].permute(0, 3, 1, 4, 2)
    sheet = rows.reshape(rows.shape[0] * rows.shape[1], -1, 3)
    Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().numpy()).save(path)


def evaluate(transformer: Path, autoencoder: Path, text_encoder: Path, sheet: Path) -> Evaluation:
    """Sample, classify, save the contact sheet and log the result."""
    pictures = sample_pictures(transformer, autoencoder, text_encoder, PER_PROMPT)
    save_sheet(pictures, sheet)
    evaluation = judge(pictures)
    logger.info("Classifier on real digits: %.1f %% right", 100 * evaluation.classifier_accuracy)
    logger.info("Classifier on sampled pictures: %.1f %% right", 100 * evaluation.accuracy)
    for prompt, share in zip(PROMPTS, evaluation.per_prompt, strict=True):
        logger.info("  %s: %.0f %%", prompt, 100 * share)
    logger.info("Wrote %s", sheet)
    return evaluation
