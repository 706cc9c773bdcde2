"""How charts look, and how they become pixels.

Dark and opaque, so they read the same in ComfyUI and on a page; colours after Okabe and Ito, which
stay apart for colour-blind eyes. matplotlib's object-oriented interface only: pyplot's state is
shared with every other pack of the process.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BACKGROUND, TEXT, GRID = "#1e1e1e", "#e8e8e8", "#555555"
BLUE, ORANGE, YELLOW = "#56B4E9", "#E69F00", "#F0E442"

_STYLE: dict[Any, Any] = {
    "figure.facecolor": BACKGROUND,
    "axes.facecolor": BACKGROUND,
    "axes.edgecolor": GRID,
    "axes.labelcolor": TEXT,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.facecolor": BACKGROUND,
    "legend.edgecolor": GRID,
    "font.size": 12,
}
_DPI = 100


def styled() -> Any:
    """Return a context in which figures have this look."""
    from matplotlib import rc_context

    return rc_context(_STYLE)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; the size is in hundreds of pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def pixels_of(figure: Figure) -> np.ndarray:
    """Draw a figure; return ``[height, width, 3]`` in uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()


def save_chart(pixels: np.ndarray, file: Path) -> None:
    """Write a chart; the file's suffix chooses the format."""
    from PIL import Image

    Image.fromarray(pixels).save(file)
