"""Charts of quality as pixels, for a node's face, a file or a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..chart_style import BACKGROUND, BLUE, ORANGE, TEXT, YELLOW, new_figure, pixels_of, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..quantized_checkpoint import QuantizedMetadata
    from .trajectory import TrajectoryReport

_EXACT_DB = 200.0
"""Headers write this where there is no error, see ``summary``."""


def sqnr_chart(metadata: QuantizedMetadata, name: str) -> np.ndarray:
    """Draw the SQNR of every block and Linear of a quantized checkpoint.

    Returns:
        ``[height, width, 3]`` in uint8.
    """
    blocks = [block.name for block in metadata.blocks]
    width = min(22.0, max(10.0, 2.5 + 0.32 * len(blocks)))
    with styled():
        figure = new_figure(width, 6)
        axes = figure.subplots()
        _block_bars(axes, metadata)
        _linear_points(axes, metadata, blocks)
        axes.set_xticks(range(len(blocks)), [_short(block) for block in blocks], rotation=90)
        axes.set_xlim(-0.7, len(blocks) - 0.3)
        axes.set_ylabel("SQNR (dB), higher is better")
        figure.suptitle(f"{name}: output of Linears, and what blocks add to their input")
        figure.legend(loc="outside lower center", ncols=3 if len(blocks) < 20 else 5)
        return pixels_of(figure)


def trajectory_chart(report: TrajectoryReport) -> np.ndarray:
    """Draw the velocity error and the drift at each evaluation.

    Returns:
        ``[height, width, 3]`` in uint8.
    """
    from matplotlib.ticker import MaxNLocator

    numbers = range(1, len(report.steps) + 1)
    lines = {
        "velocity, both models at the same x_t": (
            [step.velocity_sqnr_db for step in report.steps], BLUE, "o",
        ),
        "x_t, each model on its own trajectory": (
            [step.drift_sqnr_db for step in report.steps], ORANGE, "s",
        ),
    }  # fmt: skip
    with styled():
        figure = new_figure(10, 5)
        axes = figure.subplots()
        for label, (values, colour, marker) in lines.items():
            finite = [value if math.isfinite(value) else math.nan for value in values]
            exact = "" if any(map(math.isfinite, values)) else " (exact)"
            axes.plot(numbers, finite, color=colour, marker=marker, label=f"{label}{exact}")
        axes.set_xlabel("evaluation of the model")
        axes.set_ylabel("SQNR (dB), higher is better")
        axes.set_xlim(0.5, len(report.steps) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        sigma = axes.secondary_xaxis("top")
        shown = sorted(
            {0, len(report.steps) // 3, 2 * len(report.steps) // 3, len(report.steps) - 1}
        )
        sigma.set_xticks([i + 1 for i in shown], [f"{report.steps[i].sigma:.2f}" for i in shown])
        sigma.set_xlabel("sigma")
        figure.legend(loc="outside lower center", ncols=2)
        return pixels_of(figure)


def picture_grid(
    rows: Sequence[tuple[str, np.ndarray, np.ndarray]], titles: tuple[str, str]
) -> np.ndarray:
    """Draw pictures side by side with a heat map of their difference.

    Args:
        rows: A caption, the original and the other picture, ``[height, width, 3]`` in uint8.
        titles: Of the two columns of pictures.

    Returns:
        ``[height, width, 3]`` in uint8.
    """
    differences = [np.abs(a.astype(float) - b.astype(float)).mean(-1) / 255 for _, a, b in rows]
    # One scale for all rows; the few largest values must not turn the rest black.
    peak = max(1 / 255, max(float(np.percentile(d, 99.9)) for d in differences))
    height, width = rows[0][1].shape[:2]
    with styled():
        figure = new_figure(12, min(40.0, len(rows) * (3.5 * height / width + 0.45) + 0.6))
        grid: Any = figure.subplots(len(rows), 3, squeeze=False)
        for axes, (caption, first, second), difference in zip(grid, rows, differences, strict=True):
            for place, picture in zip(axes, (first, second), strict=False):
                place.imshow(picture, interpolation="nearest")
            heat = axes[2].imshow(
                difference, cmap="inferno", vmin=0, vmax=peak, interpolation="nearest"
            )
            for place in axes:
                place.set_axis_off()
            axes[1].set_title(caption, fontsize=11)
        for place, title in zip(grid[0], (*titles, "difference"), strict=True):
            shown = place.get_title()
            place.set_title(f"{title}\n{shown}" if shown else f"{title}\n", fontsize=12)
        bar = figure.colorbar(heat, ax=grid[:, 2].tolist(), shrink=0.9, extend="max")
        bar.set_label("mean of channels, 1 = full range", fontsize=11)
        return pixels_of(figure)


def _block_bars(axes: Axes, metadata: QuantizedMetadata) -> None:
    values = [block.update_sqnr_db for block in metadata.blocks]
    drawn = [0.0 if value >= _EXACT_DB else value for value in values]
    worst = set(_worst(values))
    colours = [ORANGE if index in worst else BLUE for index in range(len(values))]
    axes.bar(range(len(values)), drawn, color=colours, width=0.75, alpha=0.75)
    # proxies: a legend entry of a bar container takes the colour of its first bar
    axes.bar([0], [0], color=BLUE, label="block")
    if worst:
        axes.bar([0], [0], color=ORANGE, label="worst tenth of the blocks")
    for index, value in enumerate(values):
        if value >= _EXACT_DB:
            axes.text(index, 0.5, "exact", rotation=90, ha="center", va="bottom")


def _linear_points(axes: Axes, metadata: QuantizedMetadata, blocks: list[str]) -> None:
    styles = {"nvfp4": ("o", TEXT, "Linear in NVFP4"), "fp8": ("^", YELLOW, "Linear in FP8")}
    linears = [x for x in metadata.linears if x.output_sqnr_db < _EXACT_DB]
    places = [blocks.index(".".join(linear.name.split(".")[:2])) for linear in linears]
    for format_, (marker, colour, label) in styles.items():
        chosen = [i for i, linear in enumerate(linears) if linear.format == format_]
        if chosen:
            axes.scatter(
                [places[i] for i in chosen],
                [linears[i].output_sqnr_db for i in chosen],
                marker=marker, s=32, color=colour, edgecolors=BACKGROUND, label=label, zorder=3,
            )  # fmt: skip
    if linears:
        worst = min(range(len(linears)), key=lambda index: linears[index].output_sqnr_db)
        axes.scatter(
            [places[worst]], [linears[worst].output_sqnr_db],
            marker="o", s=160, facecolors="none", edgecolors=ORANGE, linewidths=2, zorder=4,
            label=f"worst Linear: {linears[worst].name}, {linears[worst].output_sqnr_db:.1f} dB",
        )  # fmt: skip


def _worst(values: Sequence[float]) -> list[int]:
    """Return the places of the lowest tenth, one at least."""
    quantized = [index for index, value in enumerate(values) if value < _EXACT_DB]
    count = math.ceil(len(quantized) / 10)
    return sorted(quantized, key=lambda index: values[index])[:count]


def _short(block: str) -> str:
    kind, _, number = block.partition("_blocks.")
    return f"{kind} {number}"
