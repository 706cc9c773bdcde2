"""The shipped workflows open in the real frontend, in a headless browser, without missing nodes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyClient
from pack_import import ROOT

HERE = Path(__file__).resolve().parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SCREENSHOTS = ROOT / "output" / "browser"
CONTROL = "unknown_node"


@pytest.fixture(scope="module")
def report(client: ComfyClient, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the frontend made of every workflow, and of one with a node that does not exist."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("Requires: node and npm")
    if not (HERE / "node_modules").is_dir():
        pytest.fail("tests/browser/node_modules is absent: run 'make browser' or 'make npm'")
    workflow = json.loads(WORKFLOWS[0].read_text())
    workflow["nodes"][0]["type"] = "NodeThatDoesNotExist"
    control = tmp_path_factory.mktemp("browser") / f"{CONTROL}.json"
    control.write_text(json.dumps(workflow))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    command = ["node", "open_workflows.mjs", client.url, str(SCREENSHOTS)]
    command += [str(path) for path in (*WORKFLOWS, control)]
    done = subprocess.run(
        command, cwd=HERE, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_opens_whole(report: dict[str, Any], path: Path) -> None:
    found = report[path.stem]
    assert found["nodes"] == len(json.loads(path.read_text())["nodes"])
    assert found["missing"] == []
    assert found["flagged"] == []
    assert found["errors"] == []
    assert not [text for text in found["dialogs"] if "missing" in text.lower()]
    assert (SCREENSHOTS / f"{path.stem}.png").stat().st_size > 10_000


def test_missing_node_is_noticed(report: dict[str, Any]) -> None:
    assert report[CONTROL]["missing"] == ["NodeThatDoesNotExist"]
