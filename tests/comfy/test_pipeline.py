"""Both shipped workflows and every stage in a real ComfyUI: pictures, cancel, cache, memory."""

from __future__ import annotations

import copy
import json
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_workflow import ApiWorkflow, the_node
from comfy_server import ComfyClient, ComfyServer, ComfyServerError
from pipeline_runs import (
    ENGINE,
    FULL_PIPELINE,
    LOAD_ENGINE,
    PROMPT,
    changed,
    executed,
    files,
    interrupt_at,
    picture,
    psnr_db,
    shipped,
    up_to,
)
from small_lora import LORA, write_small_lora
from small_workflow import (
    QUANTIZED_NAME,
    with_original_model,
    with_prompt,
    write_calibration_pictures,
)


@pytest.fixture(scope="module")
def models(server: ComfyServer) -> Path:
    """The folder of quantized checkpoints, empty at first; calibration pictures are in place."""
    write_calibration_pictures(server.base / "input")
    folder = server.base / "models" / "flux_fp4"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@pytest.fixture
def pipeline(models: Path, object_info: dict[str, Any]) -> ApiWorkflow:
    return shipped(FULL_PIPELINE, object_info)


@pytest.fixture
def engine(client: ComfyClient, pipeline: ApiWorkflow, models: Path) -> Path:
    """The folder of an engine that the full workflow has built."""
    assert client.run(pipeline).status == "success"
    return models / ENGINE


def test_full_pipeline_makes_nearly_the_original_picture(
    client: ComfyClient, pipeline: ApiWorkflow, models: Path
) -> None:
    result = client.run(pipeline)
    image = picture(client, result)
    assert image.shape == (64, 64, 3)
    assert image.std() > 5  # a picture, not a plain colour
    original = picture(client, client.run(with_original_model(pipeline)))
    assert psnr_db(image, original) > 20
    assert not np.array_equal(image, original)  # FP4 did run
    manifest = json.loads((models / ENGINE / "manifest.json").read_text())
    assert {block["fp8_mha_found"] for block in manifest["blocks"]} == {1}
    report = result.text(the_node(pipeline, "FluxFP4Inspect"))
    assert re.search(r"FP4 GEMMs (\d+) of \1\b", report)
    assert "single_blocks.3.linear2" in report
    assert "reference" in result.text(the_node(pipeline, "FluxFP4LoadEngine"))


def test_second_run_is_free(client: ComfyClient, pipeline: ApiWorkflow, engine: Path) -> None:
    again = client.run(pipeline)
    assert again.status == "success"
    assert again.node_seconds == {}


def test_new_seed_samples_only(client: ComfyClient, pipeline: ApiWorkflow, engine: Path) -> None:
    other = with_prompt(pipeline, PROMPT, seed=8)
    done = executed(other, client.run(other))
    assert "SamplerCustomAdvanced" in done
    assert not {name for name in done if name.startswith("FluxFP4")}


def test_deleted_plans_are_built_again(
    client: ComfyClient, pipeline: ApiWorkflow, engine: Path
) -> None:
    shutil.rmtree(engine)
    result = client.run(pipeline)
    done = executed(pipeline, result)
    assert {"FluxFP4BuildEngine", "FluxFP4LoadEngine"} <= done
    assert "FluxFP4Quantize" not in done
    assert (engine / "manifest.json").is_file()


def test_load_workflow_makes_the_same_picture(
    client: ComfyClient, object_info: dict[str, Any], pipeline: ApiWorkflow, engine: Path
) -> None:
    first = picture(client, client.run(with_prompt(pipeline, PROMPT, seed=21)))
    workflow = with_prompt(shipped(LOAD_ENGINE, object_info), PROMPT, seed=21)
    second = picture(client, client.run(workflow))
    np.testing.assert_array_equal(first, second)


def test_all_in_one_needs_samples_once(
    client: ComfyClient, pipeline: ApiWorkflow, object_info: dict[str, Any], engine: Path
) -> None:
    calibration = up_to(pipeline, "FluxFP4CalibrationSamples")
    samples = the_node(calibration, "FluxFP4CalibrationSamples")
    workflow = shipped(LOAD_ENGINE, object_info)
    loader = the_node(workflow, "FluxFP4LoadEngine")
    quantize = pipeline[the_node(pipeline, "FluxFP4Quantize")]["inputs"]
    build = pipeline[the_node(pipeline, "FluxFP4BuildEngine")]["inputs"]
    inputs = {
        **{name: quantize[name] for name in ("recipe", "fp8_attention")},
        **{name: value for name, value in build.items() if name != "checkpoint"},
        "checkpoint": quantize["checkpoint"],
        "backend": "auto",
    }
    workflow[loader] = {"class_type": "FluxFP4EngineFromCheckpoint", "inputs": inputs}
    refused = client.run(workflow)
    assert refused.status == "error"
    assert "FLUX Calibration Samples" in refused.error_message
    renamed = {f"c{key}": copy.deepcopy(node) for key, node in calibration.items()}
    for node in renamed.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][name] = [f"c{value[0]}", value[1]]
    first = {**copy.deepcopy(workflow), **renamed}
    first[loader]["inputs"]["samples"] = [f"c{samples}", 0]
    first_picture = picture(client, client.run(first))
    without = with_prompt(workflow, PROMPT, seed=9)
    again = picture(client, client.run(without))
    assert psnr_db(first_picture, again) < 60  # another seed: it did sample


# Cancel from the API: nothing half-written, the server lives, and the next run completes.


def test_cancel_while_building_resumes(
    client: ComfyClient, pipeline: ApiWorkflow, engine: Path, models: Path
) -> None:
    target = models / QUANTIZED_NAME / "sm121"
    shutil.rmtree(target, ignore_errors=True)
    build = up_to(changed(pipeline, "FluxFP4BuildEngine", target="sm121"), "FluxFP4BuildEngine")
    handler = interrupt_at(client, the_node(build, "FluxFP4BuildEngine"), 2)
    result = client.run(build, on_event=handler)
    assert result.status == "interrupted"
    assert handler.times["ended"] - handler.times["interrupt"] < 2
    left = files(target)
    plans = {name for name in left if name.endswith(".plan")}
    assert 2 <= len(plans) < 6
    assert "manifest.json" not in left
    assert all(name.endswith((".plan", ".lock", ".json")) for name in left)  # no temporary file
    changed_ns = {name: (target / name).stat().st_mtime_ns for name in plans}
    # The unfinished engine is not offered, and cannot be loaded by name.
    assert (
        f"{QUANTIZED_NAME}/sm121"
        not in client.object_info()["FluxFP4LoadEngine"]["input"]["required"]["engine"][1][
            "options"
        ]
    )
    assert client.run(build).status == "success"
    assert {name: (target / name).stat().st_mtime_ns for name in plans} == changed_ns
    assert "manifest.json" in files(target)


def test_server_answers_while_building(
    client: ComfyClient, pipeline: ApiWorkflow, engine: Path, models: Path
) -> None:
    shutil.rmtree(models / QUANTIZED_NAME / "sm120+sm121", ignore_errors=True)
    build = up_to(
        changed(pipeline, "FluxFP4BuildEngine", target="sm120+sm121"), "FluxFP4BuildEngine"
    )
    done = threading.Event()
    slowest = 0.0

    def ask() -> None:
        nonlocal slowest
        while not done.is_set():
            start = time.monotonic()
            client.get("/system_stats")
            slowest = max(slowest, time.monotonic() - start)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert client.run(build).status == "success"
    finally:
        done.set()
        thread.join()
    assert slowest < 5


# Memory: /free unloads the engine, the next run loads it again.


def test_free_unloads_the_engine(
    client: ComfyClient, server: ComfyServer, pipeline: ApiWorkflow, engine: Path
) -> None:
    before = picture(client, client.run(with_prompt(pipeline, PROMPT, seed=30)))
    loads = server.log().count("Requested to load Flux")
    client.free(unload_models=True)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and client.get("/queue")["queue_running"]:
        time.sleep(0.1)
    other = client.run(with_prompt(pipeline, PROMPT, seed=31))
    assert other.status == "success"
    assert server.log().count("Requested to load Flux") == loads + 1
    again = picture(client, client.run(with_prompt(pipeline, PROMPT, seed=30)))
    np.testing.assert_array_equal(before, again)


# What is wrong is said in words, at the node.


@pytest.mark.parametrize("name", ["../flux1-dev", "/etc/passwd", "a/b", "..", "", "con", "a\\b"])
def test_names_outside_the_model_folder_are_refused(
    client: ComfyClient, pipeline: ApiWorkflow, models: Path, name: str
) -> None:
    quantize = up_to(changed(pipeline, "FluxFP4Quantize", name=name), "FluxFP4Quantize")
    with pytest.raises(ComfyServerError, match="cannot be the name of a file"):
        client.run(quantize)


@pytest.mark.parametrize("engine_name", ["../small_flux/x", "/etc/passwd", "nope/sm120"])
def test_engine_names_from_widgets_are_checked(
    client: ComfyClient, object_info: dict[str, Any], engine: Path, engine_name: str
) -> None:
    workflow = shipped(LOAD_ENGINE, object_info)
    with pytest.raises(ComfyServerError, match="value_not_in_list"):
        client.run(changed(workflow, "FluxFP4LoadEngine", engine=engine_name))


@pytest.mark.parametrize("engine_name", ["../small_flux/x", "/etc/passwd", "nope/sm120", "a/b/c"])
def test_engine_names_from_links_are_checked(
    client: ComfyClient, object_info: dict[str, Any], engine: Path, engine_name: str
) -> None:
    workflow = shipped(LOAD_ENGINE, object_info)
    # A link can carry any string past the list of the widget.
    workflow["text"] = {"class_type": "PrimitiveString", "inputs": {"value": engine_name}}
    workflow["any"] = {
        "class_type": "ComfySwitchNode",
        "inputs": {"switch": True, "on_true": ["text", 0], "on_false": ["text", 0]},
    }
    result = client.run(changed(workflow, "FluxFP4LoadEngine", engine=["any", 0]))
    assert result.status == "error"
    assert "There is no engine" in result.error_message


def test_lora_is_baked_once_and_leaves_without_a_trace(
    client: ComfyClient, object_info: dict[str, Any], engine: Path, models: Path
) -> None:
    write_small_lora(models.parent / "loras")
    workflow = shipped(LOAD_ENGINE, object_info)
    without = picture(client, client.run(workflow))
    baked = changed(workflow, "FluxFP4LoadEngine", lora="baked")
    loader = the_node(baked, "FluxFP4LoadEngine")
    for node in baked.values():
        inputs = node["inputs"]
        inputs.update({name: ["lora", 0] for name, link in inputs.items() if link == [loader, 0]})
    inputs = {"model": [loader, 0], "lora_name": LORA, "strength_model": 1.0}
    baked["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    sampler = the_node(baked, "SamplerCustomAdvanced")
    first = client.run(baked)
    assert "Quantizing double_blocks.0" in first.phases(sampler)
    assert first.progress_texts(sampler)[-1] == ""
    assert psnr_db(picture(client, first), without) < 30
    # the same blocks with another seed, and the base again
    again = client.run(with_prompt(baked, PROMPT, seed=22))
    assert again.status == "success"
    assert again.progress_texts(sampler) == []
    off = client.run(changed(baked, "LoraLoaderModelOnly", strength_model=0.0))
    np.testing.assert_array_equal(picture(client, off), without)


def test_empty_latent_is_refused(client: ComfyClient, pipeline: ApiWorkflow, models: Path) -> None:
    workflow = up_to(pipeline, "FluxFP4Quantize")
    workflow["empty"] = {
        "class_type": "EmptySD3LatentImage",
        "inputs": {"width": 64, "height": 64, "batch_size": 1},
    }
    result = client.run(changed(workflow, "FluxFP4CalibrationSamples", latent=["empty", 0]))
    assert "VAE Encode" in result.error_message


def test_engine_older_than_its_checkpoint_is_refused(
    client: ComfyClient, pipeline: ApiWorkflow, object_info: dict[str, Any], engine: Path
) -> None:
    other = changed(pipeline, "FluxFP4CalibrationSamples", seed=99)
    assert client.run(up_to(other, "FluxFP4Quantize")).status == "success"
    result = client.run(shipped(LOAD_ENGINE, object_info))
    assert result.status == "error"
    assert "'rebuild stale'" in result.error_message
    # and the chain repairs it
    assert client.run(pipeline).status == "success"
