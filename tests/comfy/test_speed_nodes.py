"""The nodes about speed in a real server: what is possible, and what models take."""

from __future__ import annotations

import json
from typing import Any

import pytest
from comfy_server import ComfyClient, ComfyServer
from pipeline_runs import ENGINE, FULL_PIPELINE, shipped, up_to
from small_model_files import DIFFUSION_MODEL, TEXT_ENCODER
from small_workflow import write_calibration_pictures


def speed_limit(**inputs: Any) -> dict[str, Any]:
    defaults = {
        "model": "flux1-dev", "recipe": "nvfp4-max", "fp8_attention": True,
        "gpu": "GeForce RTX 5090", "width": 1024, "height": 1024, "batch": 1, "steps": 20,
    }  # fmt: skip
    return {"limit": {"class_type": "FluxFP4SpeedLimit", "inputs": {**defaults, **inputs}}}


def benchmark(**inputs: Any) -> dict[str, Any]:
    """Measure the small model in full precision beside its own weights in FP8."""
    clip = {"clip_name": TEXT_ENCODER, "type": "stable_diffusion"}
    text = {"text": "a handwritten digit three", "clip": ["clip", 0]}
    measured = {
        "tested": ["model", 0], "baseline": ["fp8", 0], "positive": ["text", 0],
        "latent": ["empty", 0], "steps": 3, "rounds": 2, **inputs,
    }  # fmt: skip
    return {
        "model": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": DIFFUSION_MODEL, "weight_dtype": "default"},
        },
        "fp8": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": DIFFUSION_MODEL, "weight_dtype": "fp8_e4m3fn"},
        },
        "clip": {"class_type": "CLIPLoader", "inputs": clip},
        "text": {"class_type": "CLIPTextEncode", "inputs": text},
        "empty": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 64, "height": 96, "batch_size": 2},
        },
        "benchmark": {"class_type": "FluxFP4Benchmark", "inputs": measured},
        "json": {"class_type": "PreviewAny", "inputs": {"source": ["benchmark", 2]}},
    }


def test_limits_of_a_named_gpu(client: ComfyClient) -> None:
    result = client.run(speed_limit())
    assert (result.status, result.error_message) == ("success", "")
    report = result.text("limit")
    assert report.startswith("flux1-dev, nvfp4-max, attention in FP8 on GeForce RTX 5090: at least")
    assert "Linears, NVFP4" in report
    assert len(result.previews("limit")) == 1
    # nothing has changed
    assert client.run(speed_limit()).node_seconds == {}
    slower = client.run(speed_limit(gpu="GeForce RTX 5060", fp8_attention=False, lora_rank=32))
    assert "'lora: baked' in 'Load FLUX FP4 Engine': saves" in slower.text("limit")


@pytest.mark.parametrize(
    ("inputs", "fault"),
    [
        ({"gpu": "this GPU"}, "ComfyUI computes on 'cpu' here"),
        ({"gpu": "GeForce RTX 4090"}, "has no tensor cores for NVFP4"),
        ({"recipe": "auto"}, "ask for a checkpoint that it has made"),
    ],
)
def test_what_has_no_limit_is_refused(
    client: ComfyClient, inputs: dict[str, Any], fault: str
) -> None:
    result = client.run(speed_limit(**inputs))
    assert result.status == "error"
    assert fault in result.error_message


def test_models_are_measured_in_turns(client: ComfyClient) -> None:
    result = client.run(benchmark())
    assert (result.status, result.error_message) == ("success", "")
    report = result.text("benchmark")
    assert "24 image and 77 text tokens, batch 2; 2 rounds in turns" in report
    assert "No limit is shown: the tested model is no engine" in report
    phases = [text for text in result.phases("benchmark") if text.startswith("Round")]
    names = ("tested", "baseline")
    assert phases == [f"Round {i} of 2: {name}" for i in (1, 2) for name in names]
    figures = json.loads(result.text("json"))
    assert (figures["img_tokens"], figures["txt_tokens"], figures["batch"]) == (24, 77, 2)
    assert list(figures["models"]) == list(names)
    for timing in figures["models"].values():
        # the first step of the first round is counted by itself
        assert len(timing["steps"]) == 5
        assert len(timing["pictures"]) == 2
        assert 0 < min(timing["steps"]) <= timing["first"] <= timing["pictures"][0]
    assert "float8_e4m3fn" in figures["models"]["baseline"]["name"]
    # measured anew whenever it is queued
    assert "benchmark" in client.run(benchmark()).node_seconds


def test_one_model_alone(client: ComfyClient) -> None:
    workflow = benchmark()
    del workflow["benchmark"]["inputs"]["baseline"]
    result = client.run(workflow)
    assert result.status == "success", result.error_message
    assert list(json.loads(result.text("json"))["models"]) == ["tested"]


def test_an_engine_beside_stock_comfyui(
    server: ComfyServer, client: ComfyClient, object_info: dict[str, Any]
) -> None:
    write_calibration_pictures(server.base / "input")
    pipeline = shipped(FULL_PIPELINE, object_info)
    built = client.run(up_to(pipeline, "FluxFP4BuildEngine"))
    assert built.status == "success", built.error_message
    workflow = benchmark(third=["engine", 0])
    workflow["engine"] = {
        "class_type": "FluxFP4LoadEngine",
        "inputs": {"engine": ENGINE, "backend": "auto"},
    }
    measured = workflow["benchmark"]["inputs"]
    measured["tested"], measured["third"] = measured["third"], measured["tested"]
    result = client.run(workflow)
    assert result.status == "success", result.error_message
    figures = json.loads(result.text("json"))
    assert figures["models"]["tested"]["name"].startswith(f"{ENGINE} on reference")
    assert [timing["backend"] for timing in figures["models"].values()] == ["reference", "", ""]
    report = result.text("benchmark")
    assert "tested runs on the slow CPU reference: its times say nothing about FP4." in report
    # a GPU would have one
    assert "No limit is shown: ComfyUI computes on 'cpu' here" in report
    checkpoint = ENGINE.partition("/")[0]
    limit = client.run(speed_limit(checkpoint=checkpoint))
    assert limit.text("limit").startswith(f"{checkpoint} (flux1-dev, nvfp4-max, attention in FP8)")
