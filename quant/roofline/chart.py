"""The bound of a step as a picture."""

from __future__ import annotations

import numpy as np

from ..chart_style import BLUE, ORANGE, YELLOW, new_figure, pixels_of, styled
from .bounds import BUS, COMPUTE, MEMORY, StepBound
from .report import milliseconds

_COLOURS = {COMPUTE: BLUE, MEMORY: ORANGE, BUS: YELLOW}


def bound_chart(model: str, bound: StepBound) -> np.ndarray:
    """Draw the least time of each part, coloured by what bounds it.

    Args:
        model: What it is of.
        bound: Of one step.

    Returns:
        ``[height, width, 3]`` in uint8.
    """
    parts = bound.parts[::-1]
    with styled():
        figure = new_figure(10, 1.8 + 0.55 * len(parts))
        axes = figure.subplots()
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        values = [1000 * part.seconds for part in parts]
        colours = [_COLOURS[part.cause] for part in parts]
        bars = axes.barh([part.part for part in parts], values, color=colours)
        axes.bar_label(bars, [milliseconds(part.seconds) for part in parts], padding=4)
        for cause in dict.fromkeys(part.cause for part in bound.parts):
            axes.barh([0], [0], color=_COLOURS[cause], label=f"bound by {cause}")
        axes.margins(x=0.16)
        axes.set_xlabel("ms of a step, at least")
        total = milliseconds(bound.seconds)
        figure.suptitle(f"{model}\n{bound.gpu.name}: at least {total} per step")
        figure.legend(loc="outside lower center", ncols=3)
        return pixels_of(figure)
