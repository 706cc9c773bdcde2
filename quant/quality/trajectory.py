"""Two models along one sampling trajectory: the error of each predicted velocity."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..sqnr import sqnr_db
from .tables import Row, markdown_table, text_table

_FROZEN = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class StepError(BaseModel):
    """One evaluation of the models.

    Attributes:
        sigma: Noise level, from 1 (noise) to 0 (picture).
        velocity_sqnr_db: Of the tested model's velocity, both models given the same ``x_t``;
            infinite if they agree exactly.
        drift_sqnr_db: Of the tested model's own ``x_t`` at this step against the reference's: what
            the errors have added up to. Infinite at the start.
    """

    model_config = _FROZEN

    sigma: float
    velocity_sqnr_db: float
    drift_sqnr_db: float


class TrajectoryReport(BaseModel):
    """The whole trajectory.

    Attributes:
        steps: In the order of sampling. Samplers of higher order evaluate more than once a step.
        latent_psnr_db: Of the tested model's final latent, each model on its own trajectory; the
            peak is the range of values in the reference's latent.
        latent_sqnr_db: Of the same.
    """

    model_config = _FROZEN

    steps: tuple[StepError, ...]
    latent_psnr_db: float
    latent_sqnr_db: float


def velocity(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """Return the velocity of a rectified flow, where ``denoised = x - sigma * velocity``.

    Args:
        x: Noisy latents ``[n, ...]``.
        denoised: What a model predicts the clean latents to be.
        sigma: Noise levels ``[n]``, above 0.
    """
    return (x - denoised) / sigma.reshape(-1, *(1,) * (x.ndim - 1))


def latent_psnr_db(reference: Tensor, tested: Tensor) -> float:
    """Return the PSNR in dB, with the range of the reference's values as peak."""
    error = (tested.double() - reference.double()).square().mean().item()
    peak = (reference.max() - reference.min()).double().item()
    return math.inf if error == 0 else 20 * math.log10(peak) - 10 * math.log10(error)


def trajectory_report(
    points: Sequence[tuple[Tensor, Tensor, Tensor]],
    tested: Sequence[Tensor],
    own_points: Sequence[Tensor],
    reference_latent: Tensor,
    tested_latent: Tensor,
) -> TrajectoryReport:
    """Compare what two models predicted.

    Args:
        points: ``x_t``, sigma ``[n]`` and the reference's denoised latents at every evaluation.
        tested: The tested model's denoised latents at the same points.
        own_points: ``x_t`` of the tested model's own trajectory; as many.
        reference_latent: Where the reference ended.
        tested_latent: Where the tested model ended.
    """
    steps = [
        StepError(
            sigma=sigma.max().item(),
            velocity_sqnr_db=sqnr_db(velocity(x, expected, sigma), velocity(x, found, sigma)),
            drift_sqnr_db=sqnr_db(x, own),
        )
        for (x, sigma, expected), found, own in zip(points, tested, own_points, strict=True)
    ]
    return TrajectoryReport(
        steps=tuple(steps),
        latent_psnr_db=latent_psnr_db(reference_latent, tested_latent),
        latent_sqnr_db=sqnr_db(reference_latent, tested_latent),
    )


def trajectory_text(report: TrajectoryReport) -> str:
    """Write a report with aligned columns."""
    return _written(report, text_table(*_rows(report)))


def trajectory_markdown(report: TrajectoryReport) -> str:
    """Write a report with a table of markdown."""
    return _written(report, markdown_table(*_rows(report)))


def decibels(value: float) -> str:
    """Write a ratio; without any error it is "exact"."""
    return "exact" if value == math.inf else f"{value:.1f} dB"


def _written(report: TrajectoryReport, table: str) -> str:
    finite = [s.velocity_sqnr_db for s in report.steps if math.isfinite(s.velocity_sqnr_db)]
    mean = decibels(sum(finite) / len(finite)) if finite else "exact"
    return (
        f"velocity, mean over steps: {mean}\n"
        f"final latent: PSNR {decibels(report.latent_psnr_db)}, "
        f"SQNR {decibels(report.latent_sqnr_db)}\n\n{table}"
    )


def _rows(report: TrajectoryReport) -> tuple[Row, list[Row]]:
    rows: list[Row] = [
        (
            str(number),
            f"{step.sigma:.4f}",
            decibels(step.velocity_sqnr_db),
            decibels(step.drift_sqnr_db),
        )
        for number, step in enumerate(report.steps, start=1)
    ]
    return ("evaluation", "sigma", "velocity at same x_t", "own x_t"), rows
