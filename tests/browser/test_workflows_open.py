"""The shipped workflows open in the real frontend, in a headless browser, without missing nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_workflow import ApiWorkflow, api_from_ui
from browser_runs import SCREENSHOTS, needs_browser, run_script
from comfy_server import ComfyClient, ComfyServer
from pack_import import ROOT

pytestmark = needs_browser

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
CONTROL = "unknown_node"

# Where the frontend looks for the files that the widgets of saved workflows name.
PLACES = {
    ("ControlNetLoader", "control_net_name"): "models/controlnet/{}",
    ("DualCLIPLoader", "clip_name1"): "models/text_encoders/{}",
    ("DualCLIPLoader", "clip_name2"): "models/text_encoders/{}",
    ("FluxFP4EngineFromCheckpoint", "checkpoint"): "models/diffusion_models/{}",
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
    workflow = json.loads(WORKFLOWS[0].read_text())
    workflow["nodes"][0]["type"] = "NodeThatDoesNotExist"
    control = tmp_path_factory.mktemp("browser") / f"{CONTROL}.json"
    control.write_text(json.dumps(workflow))
    paths = [str(path) for path in (*WORKFLOWS, control)]
    return run_script(client, "open_workflows.mjs", *paths, seconds=600)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_opens_whole(report: dict[str, Any], path: Path) -> None:
    found, saved = report[path.stem], json.loads(path.read_text())
    assert found["nodes"] == len(saved["nodes"])
    # the editor drops links that do not fit their ends
    assert found["links"] == len(saved["links"])
    assert found["missing"] == []
    assert found["flagged"] == []
    assert found["errors"] == []
    assert not [text for text in found["dialogs"] if "missing" in text.lower()]
    assert (SCREENSHOTS / f"{path.stem}.png").stat().st_size > 10_000


def test_missing_node_is_noticed(report: dict[str, Any]) -> None:
    assert report[CONTROL]["missing"] == ["NodeThatDoesNotExist"]
