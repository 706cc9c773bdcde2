"""Training pictures and prompts: scikit-learn's handwritten digits, enlarged."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

IMAGE_SIZE = 64

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = tuple(f"a handwritten digit {word}" for word in WORDS)

# Red, green and blue differ in paper and in ink, so that a pipeline which swaps channels or
# clips them is visible in its pictures.
PAPER = (0.06, 0.09, 0.18)
INK = (0.99, 0.93, 0.80)


def load_ink() -> tuple[Tensor, Tensor]:
    """Load the 1,797 digits.

    Returns:
        Ink coverage in [0, 1] ``[1797, 1, 64, 64]`` and labels 0 to 9 ``[1797]`` (int64).
    """
    digits = load_digits()
    # 4x4 blocks of a 32x32 bitmap were counted: a pixel is an integer from 0 to 16.
    small = torch.from_numpy(digits.images).float()[:, None] / 16.0
    # The bitmaps are cropped to the digit; a margin keeps it off the border of the picture.
    small = functional.pad(small, (1, 1, 1, 1))
    large = functional.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic")
    # Bicubic edges are six pixels wide; this steepens them and thins the strokes, like a pen's.
    edge = ((large - 0.35) / 0.5).clamp(0.0, 1.0)
    return edge * edge * (3.0 - 2.0 * edge), torch.from_numpy(digits.target).long()


def colour(ink: Tensor) -> Tensor:
    """Turn ink ``[N, 1, H, W]`` into RGB pictures ``[N, 3, H, W]`` in [0, 1]."""
    paper = torch.tensor(PAPER).view(1, 3, 1, 1)
    return paper + ink * (torch.tensor(INK).view(1, 3, 1, 1) - paper)


def ink_of(pictures: Tensor) -> Tensor:
    """Estimate the ink ``[N, 1, H, W]`` of RGB pictures ``[N, 3, H, W]``; inverse of ``colour``."""
    paper = torch.tensor(PAPER).view(1, 3, 1, 1)
    direction = torch.tensor(INK).view(1, 3, 1, 1) - paper
    projection = ((pictures - paper) * direction).sum(1, keepdim=True)
    return (projection / direction.square().sum()).clamp(0.0, 1.0)
