"""The engine manager in a real ComfyUI: what it shows, rebuilds, checks and deletes."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from api_workflow import ApiWorkflow
from comfy_server import ComfyClient, ComfyServer, ComfyServerError, PromptResult
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.in_use import InUseMark
from flux_fp4.trt_runtime.targets import build_spec
from pipeline_runs import interrupt_at
from quantize_tiny import quantize
from tiny_flux import ignore_progress, random_flux, save_flux

NAME = "managed"
ENGINE = f"{NAME}/sm120"
QUOTA = 1e-6
"""1 kB: every engine is beyond it."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small checkpoint with ONNX files and an engine; not to be changed."""
    folder = tmp_path_factory.mktemp("models") / NAME
    source = save_flux(random_flux(), folder.parent / "source.safetensors")
    checkpoint = quantize(source, folder / f"{NAME}.safetensors").path
    export_blocks(checkpoint, ignore_progress)
    build_engine(folder, build_spec("sm120", 1.0, 1, 64), ignore_progress)
    return folder


@pytest.fixture
def engine(server: ComfyServer, client: ComfyClient, built: Path) -> Path:
    """The folder of the only engine that the server has."""
    models = server.base / "models" / "flux_fp4"
    client.free(unload_models=True)
    shutil.rmtree(models, ignore_errors=True)
    shutil.copytree(built, models / NAME)
    return models / ENGINE


def manager(action: str, **inputs: Any) -> ApiWorkflow:
    inputs = {"action": action, "engine": "all", "quota": 0.0, **inputs}
    return {"manager": {"class_type": "FluxFP4EngineManager", "inputs": inputs}}


def loader(**inputs: Any) -> ApiWorkflow:
    inputs = {"engine": ENGINE, "backend": "auto", **inputs}
    return {
        "loader": {"class_type": "FluxFP4LoadEngine", "inputs": inputs},
        "preview": {"class_type": "PreviewAny", "inputs": {"source": ["loader", 0]}},
    }


def report(client: ComfyClient, workflow: ApiWorkflow) -> str:
    result = client.run(workflow)
    assert (result.status, result.error_message) == ("success", "")
    return result.text("manager")


def make_stale(engine: Path) -> None:
    """Have an engine be that of an older TensorRT release, whose plans are others."""
    path = engine / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"backend_version": "0.1"}))
    for plan in engine.glob("*.plan"):
        plan.unlink()


def is_refused(result: PromptResult, text: str) -> bool:
    return result.status == "error" and text in result.error_message


def test_list_shows_all_and_changes_nothing(client: ComfyClient, engine: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in engine.parent.rglob("*")}
    text = report(client, manager("list"))
    assert "managed     flux1-dev  nvfp4-max" in text
    (line,) = [line for line in text.splitlines() if line.startswith(ENGINE)]
    assert "4096 image, 64 text tokens, batch 1" in line
    assert line.endswith("ready")
    assert "Everything is needed." in text
    make_stale(engine)
    # the same inputs again: it looks again
    text = report(client, manager("list"))
    assert "stale: library updated: built with tensorrt_rtx 0.1" in text
    assert "'collect garbage' deletes it" in text
    names = {path for path in before if path.suffix != ".plan"}
    assert names <= set(engine.parent.rglob("*"))


def labels(client: ComfyClient) -> dict[str, str]:
    info = client.get("/object_info/FluxFP4LoadEngine")["FluxFP4LoadEngine"]
    found: dict[str, str] = info["input"]["required"]["engine"][1]["flux_fp4_labels"]
    return found


def test_labels_say_model_recipe_and_state(client: ComfyClient, engine: Path) -> None:
    made = f"{ENGINE} \u00b7 flux1-dev \u00b7 nvfp4-max \u00b7 "
    assert labels(client) == {ENGINE: f"{made}up to date"}
    make_stale(engine)
    assert labels(client)[ENGINE].startswith(made)
    assert not labels(client)[ENGINE].endswith("up to date")
    (engine.parent / f"{NAME}.safetensors").write_bytes(b"damaged")
    assert labels(client) == {ENGINE: ENGINE}


def test_a_label_is_no_markup(client: ComfyClient, engine: Path) -> None:
    """Menus of the frontend read HTML, and a checkpoint of a stranger may name any model."""
    path = engine.parent / f"{NAME}.safetensors"
    stored = path.read_bytes()
    assert b"flux1-dev" in stored
    # as long as what it replaces: lengths and offsets of the file stay true
    path.write_bytes(stored.replace(b"flux1-dev", b"<img src>"))
    assert labels(client)[ENGINE].startswith(f"{ENGINE} \u00b7 ? \u00b7 nvfp4-max")


def test_stale_engines_are_built_again_as_they_were(client: ComfyClient, engine: Path) -> None:
    make_stale(engine)
    for onnx in engine.parent.glob("*.onnx"):
        onnx.unlink()
    result = client.run(manager("rebuild stale"))
    assert f"{ENGINE} was built again: library updated" in result.text("manager")
    assert "Building double_blocks.0" in " ".join(result.progress_texts("manager"))
    manifest = json.loads((engine / "manifest.json").read_text())
    assert manifest["profile"]["max_txt_tokens"] == 64
    assert len(list(engine.glob("*.plan"))) == 3
    assert report(client, manager("rebuild stale")).startswith("No engine is stale.")
    assert client.run(loader()).status == "success"


def test_cancel_during_a_rebuild_keeps_blocks(client: ComfyClient, engine: Path) -> None:
    make_stale(engine)
    result = client.run(manager("rebuild stale"), on_event=interrupt_at(client, "manager", 1))
    assert result.status == "interrupted"
    plans = {path.name: path.stat().st_mtime_ns for path in engine.glob("*.plan")}
    assert 1 <= len(plans) < 3
    assert report(client, manager("rebuild stale", engine=ENGINE)).startswith(ENGINE)
    assert {name: (engine / name).stat().st_mtime_ns for name in plans} == plans


def test_an_engine_that_cannot_be_rebuilt_is_an_error(client: ComfyClient, engine: Path) -> None:
    (engine / "manifest.json").write_text("{}")
    result = client.run(manager("rebuild stale"))
    assert is_refused(result, f"- {ENGINE}: manifest refused")
    assert "Build TensorRT Engine" in result.error_message


def test_verify_finds_changed_bytes(client: ComfyClient, engine: Path) -> None:
    text = report(client, manager("verify"))
    assert text == f"{NAME}: all tensors as recorded\n{ENGINE}: 3 plans as recorded"
    for path in (next(engine.glob("*.plan")), engine.parent / f"{NAME}.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    text = report(client, manager("verify"))
    assert f"{NAME}: FAULT: " in text
    assert f"{ENGINE}: FAULT: " in text


def test_nothing_is_deleted_that_was_not_shown(client: ComfyClient, engine: Path) -> None:
    report(client, manager("list"))
    text = report(client, manager("collect garbage", quota=QUOTA))
    assert "1 more can go now" in text
    # its turn was used up; queued again as it is, it is not even run
    assert client.run(manager("collect garbage", quota=QUOTA)).node_seconds == {}
    assert is_refused(client.run(manager("collect garbage")), "Choose action 'list'")
    assert (engine / "manifest.json").is_file()


def test_what_was_shown_is_deleted_once(client: ComfyClient, engine: Path, built: Path) -> None:
    assert "used longest ago" in report(client, manager("list", quota=QUOTA))
    assert f"deleted: engine {engine}" in report(client, manager("collect garbage", quota=QUOTA))
    assert not engine.exists()
    assert (engine.parent / f"{NAME}.safetensors").is_file()
    shutil.copytree(built / "sm120", engine)
    assert client.run(manager("collect garbage", quota=QUOTA)).node_seconds == {}
    assert (engine / "manifest.json").is_file()


def test_a_loaded_engine_stays(client: ComfyClient, engine: Path) -> None:
    report(client, manager("list", quota=QUOTA))
    assert client.run(loader()).status == "success"
    text = report(client, loader() | manager("collect garbage", quota=QUOTA))
    assert "Nothing was left to delete." in text
    assert "ready (open)" in report(client, loader() | manager("list", quota=QUOTA))
    # what the refusal of a deletion says to do
    client.free(unload_models=True, free_memory=True)
    deadline = time.monotonic() + 30
    while "used longest ago" not in report(client, manager("list", quota=QUOTA)):
        assert time.monotonic() < deadline
    report(client, manager("collect garbage", quota=QUOTA))
    assert not engine.exists()


def test_an_engine_that_another_process_has_open_stays(client: ComfyClient, engine: Path) -> None:
    mark = InUseMark(engine)
    report(client, manager("list", quota=QUOTA))
    report(client, manager("collect garbage", quota=QUOTA))
    mark.release()
    assert (engine / "manifest.json").is_file()


def test_loader_refuses_or_rebuilds_a_stale_engine(client: ComfyClient, engine: Path) -> None:
    make_stale(engine)
    # the reference runs plans of any release, but none that are not there
    assert is_refused(client.run(loader()), "is missing. Set 'if stale'")
    rebuilt = client.run(loader(if_stale="rebuild"))
    assert (rebuilt.status, rebuilt.error_message) == ("success", "")
    assert "Building double_blocks.0" in " ".join(rebuilt.progress_texts("loader"))
    # what depends on the loader does not run again for the manifest that it wrote itself
    assert client.run(loader(if_stale="rebuild")).node_seconds == {}
    assert client.run(loader(if_stale="rebuild", lora="baked")).status == "success"


@pytest.mark.parametrize("name", ["nope/sm120", "../managed/sm120"])
def test_engine_names_are_checked(client: ComfyClient, engine: Path, name: str) -> None:
    with pytest.raises(ComfyServerError, match="value_not_in_list"):
        client.run(manager("verify", engine=name))
