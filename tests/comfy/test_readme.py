"""What the README tells users to type, typed; what it points to, found."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import succeed
from flux_fp4.quant.calibration_files import save_samples
from pack_import import ROOT
from tiny_flux import random_flux, random_samples, save_flux

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

REPOSITORY = "<this repository>"
FULL_SUITE = "make test"
"""Runs this test as well."""


def commands() -> list[str]:
    """Return every line of the README's blocks of code, without its comment."""
    blocks = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in lines]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what looks like ComfyUI in it, and a tiny model where commands name one."""
    folder = tmp_path_factory.mktemp("readme")
    comfyui = folder / "ComfyUI"
    (comfyui / "custom_nodes").mkdir(parents=True)
    (comfyui / "folder_paths.py").touch()
    (comfyui / "models" / "flux_fp4").mkdir(parents=True)
    save_flux(random_flux(), comfyui / "flux1-dev.safetensors")
    save_samples(random_samples(), comfyui / "mine.samples.safetensors")
    return folder


def run(command: str, folder: Path) -> None:
    arguments = command.replace(REPOSITORY, str(ROOT)).split()
    arguments[0] = {"python": sys.executable}.get(arguments[0], shutil.which(arguments[0]) or "")
    if arguments[1:4] == ["-m", "pip", "install"]:
        # everything is there already; on a machine without network nothing else would do
        arguments.insert(4, "--dry-run")
    succeed(arguments, folder, OMP_NUM_THREADS="1")


def test_every_command_works(tree: Path) -> None:
    """In their order: later ones need what earlier ones made."""
    lines = commands()
    assert FULL_SUITE in lines
    assert len(lines) >= 7
    for line in lines:
        if line == FULL_SUITE:
            continue
        if line.startswith("make "):
            run(line, ROOT)
        else:
            run(line, tree / "ComfyUI" if "custom_nodes/ComfyUI-FLUX-FP4 " in line else tree)
    (manifest,) = (tree / "ComfyUI" / "models" / "flux_fp4").glob("*/*/manifest.json")
    assert manifest.parent.name == "sm120"
    assert json.loads(manifest.read_text())["blocks"]
    assert (ROOT / "output" / "demo.png").stat().st_size > 10_000


def links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert [target for target in links(page) if not (page.parent / target).exists()] == []


def test_workflows_and_nodes_are_named(object_info: dict[str, dict[str, str]]) -> None:
    listed = README[README.index("## Workflows") : README.index("## Nodes")]
    assert sorted(re.findall(r"flux_fp4_\w+", listed)) == sorted(
        path.stem for path in (ROOT / "workflows").glob("*.json")
    )
    table = README[README.index("## Nodes") : README.index("## Recipes")]
    own = {info["display_name"] for name, info in object_info.items() if name.startswith("FluxFP4")}
    assert set(re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)) - {"node", "---"} == own


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for words in re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", text, re.MULTILINE):
            named |= set(words.split())
    assert "test" in named
    assert [
        target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)
    ] == []
