"""What each metric is called, compares and needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["pair", "picture", "distribution"]


@dataclass(frozen=True)
class MetricInfo:
    """A metric as users choose and read it.

    Attributes:
        title: As it is written.
        kind: Compares a picture with its partner, judges one picture, or compares whole sets.
        higher_is_better: Which way is good.
        digits: After the point, in reports.
        needs_prompts: Judges a picture by its prompt.
        reference_difference: What NVIDIA measured between FP4 PTQ and FP4 QAT of FLUX.1-dev, 30
            steps, mean over 1,000 prompts (ImageReward 1.096 and 1.119, CLIP-IQA 0.923 and 0.928,
            CLIPScore 29.86 and 29.92; bf16 had 1.118, 0.927 and 30.15). None where nothing was
            published.
    """

    title: str
    kind: Kind
    higher_is_better: bool
    digits: int
    needs_prompts: bool = False
    reference_difference: float | None = None


METRICS: dict[str, MetricInfo] = {
    "psnr": MetricInfo("PSNR (dB)", "pair", True, 2),
    "ssim": MetricInfo("SSIM", "pair", True, 4),
    "lpips": MetricInfo("LPIPS", "pair", False, 4),
    "clip_score": MetricInfo("CLIPScore", "picture", True, 3, True, 0.06),
    "clip_iqa": MetricInfo("CLIP-IQA", "picture", True, 4, False, 0.005),
    "image_reward": MetricInfo("ImageReward", "picture", True, 4, True, 0.023),
    "fid": MetricInfo("FID", "distribution", False, 3),
    "kid": MetricInfo("KID", "distribution", False, 6),
}
"""By the name that options and nodes use."""

DEFAULT_METRICS = ("psnr", "ssim")
"""They need no network and no download."""
