"""Diagrams as SVG: boxes, arrows and text in colours and shapes that have one meaning everywhere.

ComfyUI shows help pages in a panel about 450 pixels wide, half of what is drawn here, on any
background: text stands in filled boxes, or is large and of a middle grey. A line below each diagram
tells what its colours mean.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import NamedTuple

WIDTH = 900
TEXT, HEAD = 22, 26
"""Font sizes: the smallest there is, and that of what stands out."""
WHITE = "#ffffff"

COLOURS = {
    "data": "#2f6db5",
    "work": "#7a55b8",
    "file": "#96600f",
    "GPU": "#1f7a80",
    "good": "#2f7d43",
    "bad": "#b5453c",
    "off": "#626b76",
}
"""Of boxes by what they mean: white text has a contrast of 4.5 on each of them, and they have one
of 3 on the panel, be it dark (#171718) or white."""
EXPLAINED = ("data", "work", "file", "GPU")
LINE, ORANGE = "#808a96", "#c77a12"
"""Of arrows, frames and text outside of boxes; of what stands out. Contrast as above."""

MINUS, TIMES = "\u2212", "\u00d7"

Point = tuple[float, float]


class Box(NamedTuple):
    """Where something stands; arrows begin and end at the middles of its sides."""

    x: float
    y: float
    left: Point
    right: Point
    top: Point
    bottom: Point


@dataclass
class Drawing:
    """A picture that is being drawn; its height is that above the line that explains colours."""

    title: str
    height: int
    parts: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)

    def box(self, kind: str, x: float, y: float, w: float, h: float, text: str = "") -> Box:
        """Draw a box around some lines of text; its kind gives it colour and shape."""
        self.kinds.add(kind)
        self.parts.append(_shape(kind, x, y, w, h))
        self.text(x + w / 2, y + h / 2, text, WHITE)
        return _box(x, y, w, h)

    def frame(self, x: float, y: float, w: float, h: float, text: str = "") -> Box:
        """Draw a frame around what belongs together, its name along the top."""
        style = f'fill="none" stroke="{LINE}" stroke-width="3" stroke-dasharray="9 7"'
        self.parts.append(_rect(x, y, w, h, f'rx="12" {style}'))
        self.text(x + w / 2, y + 22, text)
        return _box(x, y, w, h)

    def text(self, x: float, y: float, text: str, colour: str = LINE, size: int = TEXT) -> None:
        """Write lines around a point."""
        style = f'fill="{colour}"' + (f' font-size="{size}"' if size != TEXT else "")
        lines = text.splitlines()
        for row, line in enumerate(lines):
            base = y + size * (0.36 + 1.28 * (row - (len(lines) - 1) / 2))
            shown = escape(line, quote=False)
            self.parts.append(f'<text x="{x:g}" y="{base:g}" {style}>{shown}</text>')

    def label(self, x: float, y: float, text: str, colour: str = LINE, size: int = TEXT) -> None:
        """Write lines that begin at `x`."""
        self.parts.append('<g text-anchor="start">')
        self.text(x, y, text, colour, size)
        self.parts.append("</g>")

    def line(self, *points: Point, colour: str = LINE, dashed: bool = False) -> None:
        """Draw a line along some points."""
        style = f'stroke="{colour}" stroke-width="4"' + ' stroke-dasharray="9 7"' * dashed
        self.parts.append(f'<path d="{_path(*points)}" fill="none" {style}/>')

    def arrow(self, *points: Point, colour: str = LINE, dashed: bool = False) -> None:
        """Draw an arrow along some points."""
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        neck = (x1 - 14 * dx, y1 - 14 * dy)
        self.line(*points[:-1], neck, colour=colour, dashed=dashed)
        sides = [(neck[0] + side * dy, neck[1] - side * dx) for side in (9, -9)]
        self.parts.append(f'<path d="{_path((x1, y1), *sides)}Z" fill="{colour}"/>')

    def rect(self, x: float, y: float, w: float, h: float, colour: str) -> None:
        """Fill a rectangle."""
        self.parts.append(_rect(x, y, w, h, f'fill="{colour}"'))

    def dot(self, x: float, y: float, radius: float, colour: str, ring: bool = False) -> None:
        """Draw a point, or a ring."""
        style = f'fill="none" stroke="{colour}" stroke-width="4"' if ring else f'fill="{colour}"'
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" {style}/>')

    def picture(self, x: float, y: float, size: float, shift: float = 0) -> None:
        """Draw a small landscape, its sun more or less shifted."""
        self.rect(x, y, size, size, "#5b9bd5")
        self.dot(x + size * (0.68 + shift), y + size * 0.3, size * 0.15, "#f2c14e")
        hills = ((0, 0.8), (0.32, 0.45), (0.6, 0.75), (0.75, 0.62), (1, 0.85), (1, 1), (0, 1))
        corners = [(x + size * u, y + size * v) for u, v in hills]
        self.parts.append(f'<path d="{_path(*corners)}Z" fill="#3c7a45"/>')

    def svg(self) -> str:
        """Return the picture with the line that explains its colours."""
        below = Drawing("", 0)
        shown = [kind for kind in EXPLAINED if kind in self.kinds]
        for place, kind in enumerate(shown):
            x = WIDTH / 2 + (place - len(shown) / 2) * 130 + 16
            below.box(kind, x, self.height + 20, 32, 20)
            below.label(x + 42, self.height + 30, kind)
        size = f'width="{WIDTH}" height="{self.height + 46}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height + 46}" '
            f'{size} font-family="sans-serif" font-size="{TEXT}" text-anchor="middle">'
        )
        title = f"<title>{escape(self.title, quote=False)}</title>"
        return "\n".join((head, title, *self.parts, *below.parts, "</svg>\n"))


def _box(x: float, y: float, w: float, h: float) -> Box:
    middle, centre = y + h / 2, x + w / 2
    return Box(x, y, (x, middle), (x + w, middle), (centre, y), (centre, y + h))


def _path(*points: Point) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _rect(x: float, y: float, w: float, h: float, style: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" {style}/>'


def _shape(kind: str, x: float, y: float, w: float, h: float) -> str:
    """Return a box: files have a folded corner, work is round, GPUs have pins."""
    fill, right = f'fill="{COLOURS[kind]}"', x + w
    if kind == "file":
        fold = min(18, h / 3)
        edge = _path((x, y), (right - fold, y), (right, y + fold), (right, y + h), (x, y + h))
        corner = _path((right - fold, y), (right - fold, y + fold), (right, y + fold))
        return f'<path d="{edge}Z" {fill}/><path d="{corner}Z" fill="{WHITE}" opacity="0.5"/>'
    rounding = min(26, h / 2) if kind == "work" else 4
    box = _rect(x, y, w, h, f'rx="{rounding:g}" {fill}')
    if kind != "GPU":
        return box
    rows = "".join(_path((x + 7, v), (right - 7, v)) for v in (y - 3, y + h + 3))
    return f'{box}<path d="{rows}" stroke="{COLOURS[kind]}" stroke-width="6" stroke-dasharray="6"/>'
