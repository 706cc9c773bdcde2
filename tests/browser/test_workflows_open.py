"""The shipped workflows open in the real frontend, in a headless browser, without missing nodes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest
from api_workflow import ApiWorkflow, api_from_ui
from comfy_server import ComfyClient, ComfyServer
from pack_import import ROOT

pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm") and find_library("nss3")),
    reason="Requires: node, npm and libnss3",
)

HERE = Path(__file__).resolve().parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SCREENSHOTS = ROOT / "output" / "browser"
CONTROL = "unknown_node"

# Where the frontend looks for the files that the widgets of saved workflows name.
PLACES = {
    ("DualCLIPLoader", "clip_name1"): "models/text_encoders/{}",
    ("DualCLIPLoader", "clip_name2"): "models/text_encoders/{}",
    ("FluxFP4LoadEngine", "engine"): "models/flux_fp4/{}/manifest.json",
    ("FluxFP4Quantize", "checkpoint"): "models/diffusion_models/{}",
    ("LoadImage", "image"): "input/{}",
    ("LoraLoaderModelOnly", "lora_name"): "models/loras/{}",
    ("UNETLoader", "unet_name"): "models/diffusion_models/{}",
    ("VAELoader", "vae_name"): "models/vae/{}",
}


@pytest.fixture(scope="module")
def named_files(server: ComfyServer, object_info: dict[str, Any]) -> Iterator[None]:
    """Put an empty file wherever a workflow names one: a user has them, and only names count."""
    created = {
        server.base / place
        for path in WORKFLOWS
        for place in file_places(api_from_ui(json.loads(path.read_text()), object_info))
    }
    for path in created:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    yield
    for path in created:
        path.unlink()


def file_places(workflow: ApiWorkflow) -> Iterator[str]:
    """Yield the files that the widgets of a workflow name, relative to the base folder."""
    for node in workflow.values():
        for name, value in node["inputs"].items():
            place = PLACES.get((node["class_type"], name))
            if place is None or not isinstance(value, str):
                continue
            yield place.format(value)
            if node["class_type"] == "FluxFP4LoadEngine":
                # an engine is listed only when its checkpoint is there
                checkpoint = value.partition("/")[0]
                yield f"models/flux_fp4/{checkpoint}/{checkpoint}.safetensors"


@pytest.fixture(scope="module")
def report(
    client: ComfyClient, named_files: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the frontend made of every workflow, and of one with a node that does not exist."""
    if not (HERE / "node_modules").is_dir():
        pytest.fail("tests/browser/node_modules is absent: run 'make browser' or 'make npm'")
    workflow = json.loads(WORKFLOWS[0].read_text())
    workflow["nodes"][0]["type"] = "NodeThatDoesNotExist"
    control = tmp_path_factory.mktemp("browser") / f"{CONTROL}.json"
    control.write_text(json.dumps(workflow))
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    # otherwise the first start opens the template browser over the graph
    client.post("/settings", {"Comfy.TutorialCompleted": True})
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
