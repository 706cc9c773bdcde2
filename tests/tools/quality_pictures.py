"""Small pictures for the tests of metrics."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_picture(height: int = 48, width: int = 40) -> Tensor:
    """A picture ``[1, 3, height, width]`` from 0 to 1 with edges and slopes."""
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    x = torch.linspace(0, 1, width)[None].expand(height, width)
    stripes = ((x * 9).floor() % 2) * 0.5 + 0.25
    return torch.stack((y * 0.8 + 0.1, stripes, (x * y).sqrt()))[None]


def picture_batch(count: int, noise: float, seed: int) -> Tensor:
    """A batch ``[count, 48, 40, 3]``: the gradient with noise of its own in each picture."""
    generator = torch.Generator().manual_seed(seed)
    base = gradient_picture()[0].permute(1, 2, 0)
    spread = torch.randn(count, *base.shape, generator=generator)
    return (base + noise * spread).clamp(0, 1)


def silent(_phase: str, _done: int, _total: int) -> None:
    """Progress of a test."""
