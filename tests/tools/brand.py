"""Draws the icon and the banner that the registry shows: docs/icon.png and docs/banner.png.

Usage: python tests/tools/brand.py

A block of 16 values, each in one of the eight magnitudes of E2M1 and one of two signs.
"""

from __future__ import annotations

from pack_import import ROOT
from PIL import Image, ImageDraw, ImageFont

ICON, BANNER = ROOT / "docs" / "icon.png", ROOT / "docs" / "banner.png"
ICON_SIZE = (400, 400)
"""The registry takes squares up to this."""
BANNER_SIZE = (1260, 540)
"""The registry takes 21:9."""

DARK, LIGHT = (30, 30, 30), (232, 232, 232)
PLUS, MINUS = (86, 180, 233), (230, 159, 0)
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODES = (7, 2, 12, 4, 1, 14, 3, 6, 10, 5, 0, 15, 6, 9, 4, 11)
"""Of the block: the sign is the highest bit."""
SMOOTH = 4
"""Drawn so many times as large, then reduced."""


def icon() -> Image.Image:
    """Draw the block and what it is."""
    width, height = (SMOOTH * side for side in ICON_SIZE)
    image = Image.new("RGB", (width, height), DARK)
    draw = ImageDraw.Draw(image)
    _block(draw, 0.15 * width, 0.06 * height, 0.7 * width)
    _text(draw, (width / 2, 0.875 * height), "FP4", 0.18 * height, "mm")
    return image.resize(ICON_SIZE, Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """Draw the block beside name and purpose."""
    width, height = (SMOOTH * side for side in BANNER_SIZE)
    image = Image.new("RGB", (width, height), DARK)
    draw = ImageDraw.Draw(image)
    _block(draw, 0.05 * width, 0.14 * height, 0.72 * height)
    x = 0.42 * width
    _text(draw, (x, 0.34 * height), "FLUX FP4", 0.22 * height, "lm")
    _text(draw, (x, 0.55 * height), "TensorRT engines in ComfyUI", 0.085 * height, "lm")
    _text(
        draw, (x, 0.70 * height), "quantize   export   build   sample", 0.065 * height, "lm", PLUS
    )
    return image.resize(BANNER_SIZE, Image.Resampling.LANCZOS)


def _block(draw: ImageDraw.ImageDraw, x: float, y: float, side: float) -> None:
    """Draw 4 x 4 tiles; the larger the value, the stronger its colour."""
    step, gap = side / 4, side / 40
    for place, code in enumerate(CODES):
        left, top = x + place % 4 * step, y + place // 4 * step
        strength = 0.12 + 0.88 * MAGNITUDES[code & 7] / MAGNITUDES[-1]
        tint = MINUS if code & 8 else PLUS
        colour = tuple(
            round(d + strength * (t - d)) for d, t in zip((60, 60, 60), tint, strict=True)
        )
        box = (left + gap, top + gap, left + step - gap, top + step - gap)
        draw.rounded_rectangle(box, radius=side / 40, fill=colour)


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: float,
    anchor: str,
    colour: tuple[int, int, int] = LIGHT,
) -> None:
    draw.text(place, text, colour, ImageFont.load_default(size), anchor)


def main() -> None:
    """Write both."""
    icon().save(ICON, optimize=True)
    banner().save(BANNER, optimize=True)


if __name__ == "__main__":
    main()
