"""The nodes in the real frontend as people use them: progress, cancel, help pages, languages."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from api_workflow import the_node
from browser_runs import SCREENSHOTS, needs_browser, run_script
from comfy_server import ComfyClient, ComfyServer
from pack_import import ROOT
from pipeline_runs import ENGINE, FULL_PIPELINE, changed, shipped, up_to
from small_workflow import write_calibration_pictures

pytestmark = needs_browser

OWN = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))
LANGUAGES = ("en", "zh", "zh-TW", "ja", "ko", "fr", "es", "ru")
"""Those of ours that the frontend 1.47 offers: German is not among them yet."""

WATCHED = "FluxFP4BuildEngine"


@pytest.fixture(scope="module")
def report(
    server: ComfyServer,
    client: ComfyClient,
    object_info: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What the frontend showed."""
    write_calibration_pictures(server.base / "input")
    shutil.rmtree(server.base / "models" / "flux_fp4", ignore_errors=True)
    full = shipped(FULL_PIPELINE, object_info)
    other = changed(full, WATCHED, target="sm121", workers=1)
    cases = {
        "run": full,
        "cancel": up_to(other, WATCHED),
        "waitFor": WATCHED,
        "help": OWN,
        "languages": LANGUAGES,
    }
    file = tmp_path_factory.mktemp("browser") / "cases.json"
    file.write_text(json.dumps(cases))
    found = run_script(client, "use_nodes.mjs", str(file), seconds=900)
    for part, values in found.items():
        assert "error" not in values, (part, values["error"])
    return {**found, "prompt": full}


def test_progress_moves_on_every_stage(report: dict[str, Any]) -> None:
    run = report["run"]
    assert run["ended"] == "execution_success"
    for kind in ("FluxFP4Quantize", "FluxFP4ExportONNX", WATCHED):
        node = the_node(report["prompt"], kind)
        steps = [(value, top) for who, value, top in run["progress"] if who == node]
        values = [value for value, _ in steps]
        assert values == sorted(values), kind
        assert values[-1] == steps[-1][1], kind
        assert len(set(values)) > 3, kind


def test_nodes_say_what_they_do_and_what_they_did(report: dict[str, Any]) -> None:
    texts, shown = report["run"]["texts"], report["run"]["shown"]
    assert any(text.startswith("Calibrating double_blocks.") for text in texts["FluxFP4Quantize"])
    assert any(text.startswith("Building ") for text in texts[WATCHED])
    assert "output SQNR of the quantized Linears" in shown["FluxFP4Quantize"]
    assert "FP4 GEMMs 24 of 24" in shown[WATCHED]
    assert re.search(r"\nmade in \d+", shown[WATCHED])
    assert "reference" in shown["FluxFP4LoadEngine"]


def test_cancel_button_stops_the_build(report: dict[str, Any]) -> None:
    cancelled = report["cancel"]
    assert cancelled["ended"] == "execution_interrupted"
    # the issue of a cancel is a second; a browser that paints in software takes its own
    assert cancelled["seconds"] < 5, cancelled["seconds"]
    node = the_node(report["prompt"], WATCHED)
    done = [value for who, value, _ in cancelled["progress"] if who == node]
    assert 0 < max(done) < 6


def test_picker_says_what_engines_are(report: dict[str, Any]) -> None:
    """Of the one that was built, and of the one that was cancelled if it is offered at all."""
    found = report["labels"]
    assert found["value"] == ENGINE
    assert f"{ENGINE} \u00b7 flux1-dev \u00b7 nvfp4-max \u00b7 up to date" in found["labels"]


@pytest.mark.parametrize("node_id", OWN)
def test_help_page_opens_with_its_picture(report: dict[str, Any], node_id: str) -> None:
    page = report["help"][node_id]
    lines = (ROOT / "web" / "docs" / f"{node_id}.md").read_text().splitlines()
    assert lines[0].removeprefix("# ") in page["text"]
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert headings
    assert [text for text in headings if text not in page["text"]] == []
    (picture,) = page["pictures"]
    assert picture["source"].endswith(f"{node_id}.svg")
    assert picture["text"]
    assert picture["width"] > 0, "not loaded"
    assert picture["shown"] <= page["width"]
    assert (SCREENSHOTS / f"help_{node_id}.png").stat().st_size > 10_000


@pytest.mark.parametrize("language", LANGUAGES)
def test_nodes_speak_the_language(report: dict[str, Any], language: str) -> None:
    file = Path(ROOT, "locales", language, "nodeDefs.json")
    expected = json.loads(file.read_text(encoding="utf-8"))
    for node_id in ("FluxFP4Quantize", WATCHED):
        shown = report["languages"][language][node_id]
        names = {entry["name"] for entry in expected[node_id]["inputs"].values()}
        assert shown["title"] == expected[node_id]["display_name"]
        assert shown["widgets"]
        assert set(shown["widgets"]) <= names
