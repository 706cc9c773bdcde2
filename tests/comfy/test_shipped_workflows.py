"""Every shipped workflow on the small models: it runs, and draws nearly what its original does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_workflow import ApiWorkflow, api_from_ui
from comfy_cli import comfy
from comfy_server import ComfyClient, ComfyServer
from pack_import import ROOT
from pipeline_runs import FULL_PIPELINE, picture, psnr_db, shipped
from shipped_workflows import WORKFLOWS, drawn
from small_workflow import with_original_model
from workflow_inputs import write_small_models

WITHOUT_PICTURE = {"flux_fp4_batch_build"}
WITHOUT_ORIGINAL = {"flux_fp4_compare", "flux_fp4_benchmark", *WITHOUT_PICTURE}
"""Workflows that do not draw a picture of one model."""


@pytest.fixture(scope="module")
def engine(server: ComfyServer, client: ComfyClient, object_info: dict[str, Any]) -> None:
    """All that workflows load, and the engine that some start from."""
    write_small_models(server.base)
    assert client.run(shipped(FULL_PIPELINE, object_info), 600).status == "success"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_file_is_as_drawn(name: str, object_info: dict[str, Any]) -> None:
    """`make workflows` writes them."""
    assert (ROOT / "workflows" / f"{name}.json").read_text() == drawn(name, object_info)


def test_no_other_file_is_there() -> None:
    assert {path.stem for path in (ROOT / "workflows").glob("*.json")} == set(WORKFLOWS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_runs(
    client: ComfyClient, engine: None, object_info: dict[str, Any], name: str
) -> None:
    workflow = shipped(name, object_info)
    result = client.run(workflow, 600)
    assert (result.status, result.error_message) == ("success", "")
    if name in WITHOUT_PICTURE:
        assert result.images() == []
        return
    image = picture(client, result)
    assert image.std() > 5  # a picture, not a plain colour
    if name not in WITHOUT_ORIGINAL:
        original = picture(client, client.run(with_original_model(workflow), 600))
        closeness = psnr_db(image, original)
        assert 15 < closeness < 60, f"{closeness:.1f} dB"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_comfy_cli_finds_it_valid(
    client: ComfyClient, engine: None, name: str, tmp_path: Path, home: Path
) -> None:
    """Types of nodes, inputs, choices and links, by ComfyUI's own command line."""
    now = client.object_info()
    (tmp_path / "workflow.json").write_text(json.dumps(shipped(name, now)))
    (tmp_path / "object_info.json").write_text(json.dumps(now))
    arguments = ("--workflow", "workflow.json", "--input", "object_info.json")
    said = comfy("--json", "workflow", "validate", *arguments, folder=tmp_path, home=home)
    (answer,) = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    found = answer["data"]
    assert (found["valid"], found["errors"], found["warnings"]) == (True, [], [])


def test_second_run_makes_no_engine(
    client: ComfyClient, engine: None, object_info: dict[str, Any]
) -> None:
    """Of workflows with calibration and sampling in one, only sampling runs for a new prompt."""
    name = "flux_fp4_svdquant"
    assert client.run(shipped(name, object_info), 600).status == "success"
    workflow = shipped(name, object_info)
    noise = next(n for n in workflow.values() if n["class_type"] == "RandomNoise")
    noise["inputs"]["noise_seed"] = 8
    result = client.run(workflow, 600)
    assert result.status == "success"
    ran = {workflow[node]["class_type"] for node in result.node_seconds}
    assert "SamplerCustomAdvanced" in ran
    assert not {kind for kind in ran if kind.startswith("FluxFP4")}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_frames_hold_whole_nodes(name: str) -> None:
    """Nodes do not overlap, and a frame cuts through none."""
    saved = json.loads((ROOT / "workflows" / f"{name}.json").read_text())
    boxes = {
        node["id"]: np.array([*node["pos"], *np.add(node["pos"], node["size"])])
        - np.array([0, 30, 0, 0])
        for node in saved["nodes"]
    }
    for first, a in boxes.items():
        for second, b in boxes.items():
            if first < second:
                assert not _overlap(a, b), (first, second)
    frames = [
        np.array([x, y, x + w, y + h]) for x, y, w, h in (g["bounding"] for g in saved["groups"])
    ]
    for number, frame in enumerate(frames):
        for node, box in boxes.items():
            inside = (box[:2] >= frame[:2]).all() and (box[2:] <= frame[2:]).all()
            assert inside or not _overlap(frame, box), node
        assert not any(_overlap(frame, other) for other in frames[number + 1 :])


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a[:2] < b[2:]).all() and (b[:2] < a[2:]).all())


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_node_is_used(name: str, object_info: dict[str, Any]) -> None:
    """What nothing is made of would be left over from drawing."""
    saved = json.loads((ROOT / "workflows" / f"{name}.json").read_text())
    workflow: ApiWorkflow = api_from_ui(saved, object_info)
    linked = {
        value[0]
        for node in workflow.values()
        for value in node["inputs"].values()
        if isinstance(value, list)
    }
    ends = {key for key, node in workflow.items() if object_info[node["class_type"]]["output_node"]}
    assert set(workflow) == linked | ends
