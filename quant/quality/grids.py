"""Which pairs a grid shows, and what it says about each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .catalog import METRICS
from .pair_metrics import PSNR, as_floats
from .pictures import Pictures
from .report import QualityReport

SHOWN = 4


def worst_pairs(
    report: QualityReport, originals: Pictures, tested: Pictures, shown: int = SHOWN
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return the pairs with the lowest PSNR for `picture_grid`, the worst first."""
    found = report.of("psnr", tested.name)
    noise = [_psnr(originals, tested, i) for i in range(len(tested))] if found is None else found
    chosen = sorted(range(len(tested)), key=lambda index: noise[index])[:shown]
    return [
        (
            _caption(report, originals, tested, index),
            _pixels(originals, index),
            _pixels(tested, index),
        )
        for index in chosen
    ]


def _psnr(originals: Pictures, tested: Pictures, index: int) -> float:
    return PSNR().value(as_floats(originals[index]), as_floats(tested[index]))


def _caption(report: QualityReport, originals: Pictures, tested: Pictures, index: int) -> str:
    parts = []
    for name in ("psnr", "ssim", "lpips"):
        values: Sequence[float] | None = report.of(name, tested.name)
        if values is not None:
            parts.append(f"{METRICS[name].title} {values[index]:.{METRICS[name].digits}f}")
    return f"{originals.labels[index]}: {', '.join(parts)}" if parts else originals.labels[index]


def _pixels(pictures: Pictures, index: int) -> np.ndarray:
    return np.asarray(torch.permute(pictures[index], (1, 2, 0)))
