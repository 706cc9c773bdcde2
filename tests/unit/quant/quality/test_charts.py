"""Charts hold what they are given; how they look was judged by eye."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flux_fp4.quant.chart_style import save_chart
from flux_fp4.quant.quality import charts
from flux_fp4.quant.quality.grids import worst_pairs
from flux_fp4.quant.quality.pictures import BatchPictures
from flux_fp4.quant.quality.report import MetricValues, QualityReport
from flux_fp4.quant.quality.trajectory import StepError, TrajectoryReport
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from PIL import Image
from quality_pictures import picture_batch


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep the figures that are drawn."""
    drawn: list[Any] = []
    pixels = charts.pixels_of

    def keep(figure: Any) -> np.ndarray:
        drawn.append(figure)
        return pixels(figure)

    monkeypatch.setattr(charts, "pixels_of", keep)
    return drawn


def labels(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_sqnr_chart_marks_the_worst(quantized: QuantizedCheckpoint, figures: list[Any]) -> None:
    metadata = quantized.metadata
    pixels = charts.sqnr_chart(metadata, "tiny")
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.dtype == np.uint8
    (axes,) = figures[0].axes
    heights = [bar.get_height() for bar in axes.patches[: len(metadata.blocks)]]
    assert heights == [block.update_sqnr_db for block in metadata.blocks]
    worst = min(metadata.linears, key=lambda linear: linear.output_sqnr_db)
    assert f"worst Linear: {worst.name}, {worst.output_sqnr_db:.1f} dB" in labels(figures[0])
    points = axes.collections[0].get_offsets()
    assert len(points) == len(metadata.linears)


def test_pyplot_is_never_loaded(quantized: QuantizedCheckpoint) -> None:
    import sys

    import matplotlib

    before = matplotlib.rcParams["text.color"]
    sys.modules.pop("matplotlib.pyplot", None)
    charts.sqnr_chart(quantized.metadata, "tiny")
    assert "matplotlib.pyplot" not in sys.modules
    assert matplotlib.rcParams["text.color"] == before


def test_trajectory_chart_draws_exact_steps_as_gaps(figures: list[Any]) -> None:
    steps = tuple(
        StepError(
            sigma=1 - i / 4, velocity_sqnr_db=20 + i, drift_sqnr_db=math.inf if i == 0 else 40
        )
        for i in range(4)
    )
    charts.trajectory_chart(TrajectoryReport(steps=steps, latent_psnr_db=30, latent_sqnr_db=20))
    velocity, drift = figures[0].axes[0].lines
    assert list(velocity.get_ydata()) == [20, 21, 22, 23]
    assert math.isnan(drift.get_ydata()[0])
    assert list(drift.get_ydata()[1:]) == [40, 40, 40]


def test_exact_trajectory_says_so(figures: list[Any]) -> None:
    steps = (StepError(sigma=1, velocity_sqnr_db=math.inf, drift_sqnr_db=math.inf),)
    charts.trajectory_chart(
        TrajectoryReport(steps=steps, latent_psnr_db=math.inf, latent_sqnr_db=9)
    )
    assert all(label.endswith("(exact)") for label in labels(figures[0]))


def test_grid_shows_the_difference_on_one_scale(figures: list[Any], tmp_path: Path) -> None:
    first = np.zeros((20, 30, 3), np.uint8)
    second = first.copy()
    second[5:10, 5:10] = 51
    pixels = charts.picture_grid([("a", first, second), ("b", first, first)], ("one", "two"))
    axes = figures[0].axes
    heats = [axes[2].images[0], axes[5].images[0]]
    assert heats[0].get_array()[7, 7] == pytest.approx(0.2)
    assert not heats[1].get_array().any()
    assert heats[0].get_clim() == heats[1].get_clim() == (0, pytest.approx(0.2))
    save_chart(pixels, tmp_path / "grid.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), pixels)


@pytest.mark.parametrize("measured", [True, False], ids=["psnr measured", "psnr not measured"])
def test_grid_takes_the_worst_pairs(measured: bool) -> None:
    clean = picture_batch(6, 0.0, seed=1)
    noise = picture_batch(6, 0.3, seed=2)
    other = clean.clone()
    for index, share in enumerate((0.1, 0.5, 0.2, 0.9, 0.0, 0.3)):
        other[index] = (1 - share) * clean[index] + share * noise[index]
    psnr = (30.0, 16.0, 24.0, 11.0, math.inf, 20.0)
    values = MetricValues(metric="psnr", pictures="b", values=psnr, mean=None, infinite=1)
    report = QualityReport(
        original="a",
        tested=("b",),
        pictures=tuple("123456"),
        values=(values,) if measured else (),
        comparisons=(),
        distances=(),
    )
    shown = worst_pairs(report, BatchPictures("a", clean), BatchPictures("b", other), 3)
    assert [caption.partition(":")[0] for caption, _, _ in shown] == ["4", "2", "6"]
    assert shown[0][1].shape == (48, 40, 3)
    assert ("PSNR (dB) 11.00" in shown[0][0]) == measured
