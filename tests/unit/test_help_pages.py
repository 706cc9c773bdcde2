"""Pictures of the help pages: there, readable, harmless, and as the program draws them."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import help_diagrams
import pytest
from diagram import COLOURS, LINE, ORANGE, TEXT, WHITE
from help_diagrams import PAGES
from overview_diagram import FILE, overview
from pack_import import ROOT

DOCS = ROOT / "web" / "docs"
NODES = sorted(path.stem for path in DOCS.glob("*.md"))
PANEL = "#171718"
"""ComfyUI's dark panel; a light one is white."""

IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)]*)\)|<img\b")
SVG = "{http://www.w3.org/2000/svg}"


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours, as WCAG 2 defines it."""
    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_pages_and_pictures_belong_together() -> None:
    assert NODES == sorted(PAGES) == sorted(path.stem for path in DOCS.glob("*.svg"))


@pytest.mark.parametrize("node", NODES)
def test_page_shows_its_picture(node: str) -> None:
    """Under the first paragraph, once; the panel puts the alternative text between quotes."""
    text = (DOCS / f"{node}.md").read_text(encoding="utf-8")
    found = list(IMAGE.finditer(text))
    assert [image[2] for image in found] == [f"{node}.svg"]
    assert len(found[0][1].split()) > 5
    assert '"' not in found[0][1]
    assert text.split("\n\n")[2] == found[0][0]


@pytest.mark.parametrize("node", NODES)
def test_picture_is_what_the_program_draws(node: str) -> None:
    """Otherwise run `python tests/tools/help_diagrams.py`."""
    assert (DOCS / f"{node}.svg").read_text(encoding="utf-8") == PAGES[node]().svg()


@pytest.mark.parametrize("node", NODES)
def test_picture_is_small_and_harmless(node: str) -> None:
    data = (DOCS / f"{node}.svg").read_bytes()
    assert len(data) < 20_000
    root = ElementTree.fromstring(data)
    assert root.tag == f"{SVG}svg"
    assert (root.findtext(f"{SVG}title") or "").strip()
    for element in root.iter():
        assert element.tag.removeprefix(SVG) in {
            "svg", "title", "defs", "g", "use", "rect", "path", "circle", "text",
        }  # fmt: skip
        for name, value in element.attrib.items():
            assert not name.lower().startswith("on"), name
            assert "href" not in name or value.startswith("#"), value
            assert "url(" not in value, value


@pytest.mark.parametrize("node", NODES)
def test_text_is_large_enough_for_the_panel(node: str) -> None:
    """It is shown at half size."""
    root = ElementTree.fromstring((DOCS / f"{node}.svg").read_bytes())
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    assert root.get("width") == "900"
    assert root.get("font-size") == str(TEXT)
    sizes = {int(element.get("font-size", TEXT)) for element in root.iter(f"{SVG}text")}
    assert min(sizes) >= 22


@pytest.mark.parametrize("panel", [PANEL, WHITE])
@pytest.mark.parametrize("colour", [*COLOURS.values(), LINE, ORANGE])
def test_colours_stand_out(colour: str, panel: str) -> None:
    assert contrast(colour, panel) >= 3


@pytest.mark.parametrize("colour", COLOURS.values(), ids=COLOURS)
def test_text_in_boxes_is_readable(colour: str) -> None:
    assert contrast(colour, WHITE) >= 4.5


def test_program_writes_every_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "web" / "docs"
    folder.mkdir(parents=True)
    monkeypatch.setattr(help_diagrams, "ROOT", tmp_path)
    help_diagrams.main()
    assert sorted(path.stem for path in folder.iterdir()) == NODES


def test_overview_is_what_the_program_draws() -> None:
    """Otherwise run `python tests/tools/overview_diagram.py`."""
    assert FILE.read_text(encoding="utf-8") == overview().svg()
