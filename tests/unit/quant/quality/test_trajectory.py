"""Velocity errors from predictions, in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from flux_fp4.quant.quality.trajectory import (
    latent_psnr_db,
    trajectory_markdown,
    trajectory_report,
    trajectory_text,
    velocity,
)


def test_velocity_is_that_of_the_flow() -> None:
    clean, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    sigma = torch.tensor([0.7, 0.2])
    t = sigma[:, None, None, None]
    x = (1 - t) * clean + t * noise
    assert torch.allclose(velocity(x, clean, sigma), noise - clean, atol=1e-5)


def test_report_separates_prediction_and_drift() -> None:
    x, sigma = torch.randn(1, 4, 3, 3), torch.tensor([0.5])
    expected = x - 0.5 * torch.ones_like(x)  # velocity 1
    found = x - 0.5 * 1.1 * torch.ones_like(x)  # velocity 1.1: a tenth off, 20 dB
    report = trajectory_report([(x, sigma, expected)], [found], [1.01 * x], x, x)
    (step,) = report.steps
    assert step.velocity_sqnr_db == pytest.approx(20, abs=1e-3)
    assert step.drift_sqnr_db == pytest.approx(40, abs=1e-3)
    assert step.sigma == 0.5
    assert report.latent_psnr_db == math.inf


def test_latent_psnr_has_the_range_as_peak() -> None:
    reference = torch.tensor([-1.0, 3.0])
    assert latent_psnr_db(reference, reference + 0.4) == pytest.approx(20.0)


def test_texts_have_a_row_per_evaluation() -> None:
    x, sigma = torch.ones(1, 1, 2, 2), torch.tensor([1.0])
    latent = torch.tensor([-1.0, 1.0])
    report = trajectory_report([(x, sigma, 0 * x)], [0.1 * x], [x], latent, 0.9 * latent)
    text = trajectory_text(report)
    assert "velocity, mean over steps: 20.0 dB" in text
    assert text.splitlines()[-1].split() == ["1", "1.0000", "20.0", "dB", "exact"]
    assert "| 1 | 1.0000 | 20.0 dB | exact |" in trajectory_markdown(report)
