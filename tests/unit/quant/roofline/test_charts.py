"""Pictures of bounds and of measured times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flux_fp4.quant.recipe import QuantizeOptions
from flux_fp4.quant.roofline import chart, timing_chart
from flux_fp4.quant.roofline.bounds import step_bound
from flux_fp4.quant.roofline.gpus import gpu_peaks
from flux_fp4.quant.roofline.subjects import published_subject
from flux_fp4.quant.roofline.timing_chart import TimedBar
from flux_fp4.quant.roofline.work import StepSizes


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep the figures that are drawn."""
    drawn: list[Any] = []

    def keep(figure: Any) -> np.ndarray:
        drawn.append(figure)
        return np.zeros((1, 1, 3), np.uint8)

    for module in (chart, timing_chart):
        monkeypatch.setattr(module, "pixels_of", keep)
    return drawn


def texts(figure: Any) -> list[str]:
    (axes,) = figure.axes
    return [text.get_text() for text in axes.texts]


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_bound_shows_every_part_and_its_cause(figures: list[Any]) -> None:
    subject = published_subject("flux1-dev", QuantizeOptions())
    gpu = gpu_peaks("GeForce RTX 5090")
    bound = step_bound(subject.config, StepSizes(1, 4096, 512), subject.options, gpu, 20)
    chart.bound_chart(subject.name, bound)
    (figure,) = figures
    (axes,) = figure.axes
    assert {label.get_text() for label in axes.get_yticklabels()} == {p.part for p in bound.parts}
    assert set(texts(figure)) == {f"{1000 * part.seconds:.1f} ms" for part in bound.parts}
    assert set(legend(figure)) == {f"bound by {part.cause}" for part in bound.parts}
    assert "GeForce RTX 5090: at least" in figure.get_suptitle()


def test_bars_of_a_row_touch_and_the_least_time_marks_the_first(figures: list[Any]) -> None:
    rows = {
        "double": [TimedBar("engine", 0.002, 0.001, 0.004), TimedBar("bf16", 0.008, 0.008, 0.008)],
        "single": [TimedBar("engine", 0.001, 0.001, 0.001), TimedBar("bf16", 0.003, 0.003, 0.003)],
    }
    timing_chart.timing_chart("title", rows, {"single": 0.0005})
    (figure,) = figures
    (axes,) = figure.axes
    assert set(legend(figure)) == {"engine", "bf16", "least time"}
    assert texts(figure) == ["2.00 ms", "1.00 ms", "8.00 ms", "3.00 ms"]
    centres = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    double, single, double_bf16, single_bf16 = centres
    assert double_bf16 - double == pytest.approx(axes.patches[0].get_height())
    assert single - double_bf16 > double_bf16 - double
    (mark,) = [line for line in axes.lines if line.get_label() == "least time"]
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (0.5, pytest.approx(single))
    assert single_bf16 > single


def test_without_a_bound_nothing_is_marked(figures: list[Any]) -> None:
    timing_chart.timing_chart("title", {"a": [TimedBar("step", 1, 1, 1)]}, {})
    assert legend(figures[0]) == ["step"]
