"""Measured times as a picture, with the least time that there can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..chart_style import BLUE, ORANGE, TEXT, YELLOW, new_figure, pixels_of, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 0.38
_COLOURS = (BLUE, ORANGE)


@dataclass(frozen=True)
class TimedBar:
    """What was measured of one thing.

    Attributes:
        label: What it is, as the legend says it: of at most two kinds in a picture.
        median: Seconds.
        low: Half of all measurements lie from here
        high: to here.
    """

    label: str
    median: float
    low: float
    high: float


def timing_chart(
    title: str, rows: Mapping[str, Sequence[TimedBar]], least: Mapping[str, float]
) -> np.ndarray:
    """Draw medians, with the middle half of all measurements.

    Args:
        title: Above the picture.
        rows: Bars by what stands beside them.
        least: Seconds that the first bar of a row cannot go below, where they are known.

    Returns:
        ``[height, width, 3]`` in uint8.
    """
    labels = list(dict.fromkeys(bar.label for bars in rows.values() for bar in bars))
    with styled():
        figure = new_figure(10, 2.2 + 0.55 * sum(map(len, rows.values())))
        axes = figure.subplots()
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        places = _places(rows)
        for label, colour in zip(labels, _COLOURS, strict=False):
            chosen = [(places[key], bar) for key, bar in _bars(rows) if bar.label == label]
            _draw_bars(axes, label, colour, chosen)
        known = [name for name in rows if name in least]
        if known:
            marks = [1000 * least[name] for name in known]
            firsts = [places[name, 0] for name in known]
            axes.plot(marks, firsts, "|", color=YELLOW, ms=30, mew=4, label="least time")
        middles = [np.mean([places[name, i] for i in range(len(rows[name]))]) for name in rows]
        axes.set_yticks(middles, list(rows))
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        axes.set_xlabel("ms: median, and the middle half of all calls")
        figure.suptitle(title)
        figure.legend(loc="outside lower center", ncols=3, markerscale=0.5)
        return pixels_of(figure)


def _draw_bars(
    axes: Axes, label: str, colour: str, placed: Sequence[tuple[float, TimedBar]]
) -> None:
    drawn = axes.barh(
        [place for place, _ in placed],
        [1000 * bar.median for _, bar in placed],
        _HEIGHT,
        xerr=_errors([bar for _, bar in placed]),
        color=colour,
        ecolor=TEXT,
        label=label,
    )
    axes.bar_label(drawn, [f"{1000 * bar.median:.2f} ms" for _, bar in placed], padding=8)


def _bars(rows: Mapping[str, Sequence[TimedBar]]) -> list[tuple[tuple[str, int], TimedBar]]:
    return [((name, i), bar) for name, bars in rows.items() for i, bar in enumerate(bars)]


def _places(rows: Mapping[str, Sequence[TimedBar]]) -> dict[tuple[str, int], float]:
    """Return where each bar stands: those of a row touch, and rows stand apart."""
    places, at = {}, 0.0
    for name, bars in rows.items():
        for index in range(len(bars)):
            places[name, index] = at
            at += _HEIGHT
        at += 0.6 * _HEIGHT
    return places


def _errors(bars: Sequence[TimedBar]) -> tuple[list[float], list[float]]:
    """Return what is below and above each median, in ms."""
    below = [1000 * (bar.median - bar.low) for bar in bars]
    above = [1000 * (bar.high - bar.median) for bar in bars]
    return below, above
