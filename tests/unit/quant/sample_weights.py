"""Weights that quantizers have trouble with, all exact in fp16."""

from __future__ import annotations

import torch


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).half().float()


def heavy_tails() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 256, generator=generator)
    return (x.sign() * x.abs() ** 6).clamp(-6e4, 6e4).half().float()


def with_zero_blocks() -> torch.Tensor:
    x = normal(64, 128, seed=2)
    x[3] = 0
    x[:, 16:32] = 0
    x[0, 0] = -0.0
    return x
