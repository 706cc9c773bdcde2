"""Errors as users meet them: in the errors panel and the error dialog of the real frontend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from api_workflow import ApiWorkflow, the_node
from browser_runs import needs_browser, run_script
from comfy_server import ComfyClient, ComfyServer
from flux_fp4.trt_runtime.errors import REBUILD
from pipeline_runs import ENGINE, FULL_PIPELINE, LOAD_ENGINE, changed, shipped, up_to
from small_model_files import DIFFUSION_MODEL
from small_workflow import QUANTIZED_NAME, write_calibration_pictures

pytestmark = needs_browser

TARGET = ENGINE.partition("/")[2]

# What has to be read in full, and the node that has to be marked.
EXPECTED = {
    "calibration_missing": (
        f"'small_flux-nvfp4-max' has to be quantized from '{DIFFUSION_MODEL}' first, which needs "
        "calibration samples. Connect 'FLUX Calibration Samples' to 'samples'.",
        "FluxFP4EngineFromCheckpoint",
    ),
    "recipe_invalid": (
        "Recipe 'mine.yaml' cannot be used: linears: Input should be 'nvfp4', 'fp8' or 'bf16'. "
        "Correct the file or choose another recipe in 'Quantize FLUX to FP4'.",
        "FluxFP4EngineFromCheckpoint",
    ),
    "preflight": (
        "'small_flux-nvfp4-max' cannot be made here:\n"
        "- Target 'sm89' cannot run the NVFP4 weights of 'double_blocks.0': that needs one of "
        "sm100, sm103, sm120, sm121. Choose such a 'target', or recipe 'fp8' in 'Quantize FLUX to "
        "FP4'.",
        "FluxFP4EngineFromCheckpoint",
    ),
    "engine_outdated": (
        f"Engine 'outdated/{TARGET}' was built before 'outdated' was quantized again, so the two "
        f"hold different weights. {REBUILD}",
        "FluxFP4LoadEngine",
    ),
    "engine_stale": (
        f"is older than 'double_blocks.0.onnx', which was exported again. {REBUILD}",
        "FluxFP4LoadEngine",
    ),
    "picture_too_large": (
        "This run needs 9216 image tokens (2.25 megapixels, reference pictures included). The "
        "engine takes 16 to 4096 (1.00 megapixels). Make the picture smaller, or build again with "
        "a larger 'max megapixels' in 'Build TensorRT Engine'.",
        "SamplerCustomAdvanced",
    ),
    "name_leaves_folder": (
        "'../x' cannot be the name of a file: it starts with a dot, which hides the folder. Enter "
        "a plain name such as 'flux1-dev-nvfp4' in 'Quantize FLUX to FP4'.",
        "FluxFP4Quantize",
    ),
    "no_checkpoint": ("gone.safetensors", "FluxFP4EngineFromCheckpoint"),
}
# The panel is ComfyUI's default, the dialog comes without its setting 'Show errors tab'.
SHOWN = [(name, "panel") for name in EXPECTED]
SHOWN += [(name, "dialog") for name in ("preflight", "picture_too_large", "name_leaves_folder")]


@pytest.fixture(scope="module")
def prompts(
    server: ComfyServer, client: ComfyClient, object_info: dict[str, Any]
) -> dict[str, ApiWorkflow]:
    """A prompt for every expected error; those about engines have one to be about."""
    write_calibration_pictures(server.base / "input")
    models = server.base / "models" / "flux_fp4"
    shutil.rmtree(models, ignore_errors=True)
    full = shipped(FULL_PIPELINE, object_info)
    full = changed(full, "FluxFP4CalibrationSamples", timesteps=1)
    full = changed(full, "FluxFP4BuildEngine", max_megapixels=1.0)
    built = client.run(up_to(full, "FluxFP4BuildEngine"))
    assert (built.status, built.error_message) == ("success", "")
    damage_engines(models)
    (models / "recipes").mkdir()
    (models / "recipes" / "mine.yaml").write_text("name: mine\nsummary: x\nlinears: int4\n")
    calibration = up_to(full, "FluxFP4CalibrationSamples")
    samples = [the_node(calibration, "FluxFP4CalibrationSamples"), 0]
    load = shipped(LOAD_ENGINE, object_info)
    return {
        "calibration_missing": from_checkpoint(object_info),
        "recipe_invalid": from_checkpoint(object_info, recipe="mine"),
        "preflight": calibration | from_checkpoint(object_info, target="sm89", samples=samples),
        "engine_outdated": changed(load, "FluxFP4LoadEngine", engine=f"outdated/{TARGET}"),
        "engine_stale": changed(load, "FluxFP4LoadEngine", engine=f"stale/{TARGET}"),
        "picture_too_large": changed(load, "EmptySD3LatentImage", width=1536, height=1536),
        "name_leaves_folder": changed(
            up_to(full, "FluxFP4Quantize"), "FluxFP4Quantize", name="../x"
        ),
        "no_checkpoint": from_checkpoint(object_info, checkpoint="gone.safetensors"),
    }


def damage_engines(models: Path) -> None:
    """Leave beside the engine one of other weights, and one whose ONNX files are newer."""
    for name in ("outdated", "stale"):
        shutil.copytree(models / QUANTIZED_NAME, models / name)
        # the ONNX files still point into the old one
        shutil.copy(
            models / name / f"{QUANTIZED_NAME}.safetensors", models / name / f"{name}.safetensors"
        )
    manifest = models / "outdated" / TARGET / "manifest.json"
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(fields | {"checkpoint_digest": "0" * 64}))
    with (models / "stale" / "double_blocks.0.onnx").open("ab") as file:
        file.write(b"\0")


def from_checkpoint(object_info: dict[str, Any], **changes: Any) -> ApiWorkflow:
    """Return a graph of 'FLUX FP4 from Checkpoint' at its defaults, its MODEL saved."""
    required = object_info["FluxFP4EngineFromCheckpoint"]["input"]["required"]
    inputs = {
        name: options["default"] for name, (_, options) in required.items() if "default" in options
    }
    inputs |= {"checkpoint": DIFFUSION_MODEL} | changes
    return {
        "100": {"class_type": "FluxFP4EngineFromCheckpoint", "inputs": inputs},
        "101": {"class_type": "ModelSave", "inputs": {"model": ["100", 0], "filename_prefix": "x"}},
    }


@pytest.fixture(scope="module")
def report(
    client: ComfyClient, prompts: dict[str, ApiWorkflow], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the frontend shows of every error, in its panel and in its dialog."""
    cases = {
        name: {
            "prompt": prompt,
            "text": EXPECTED[name][0],
            "places": [place for shown, place in SHOWN if shown == name],
        }
        for name, prompt in prompts.items()
    }
    file = tmp_path_factory.mktemp("browser") / "cases.json"
    file.write_text(json.dumps(cases))
    return run_script(client, "show_errors.mjs", str(file), seconds=900)


@pytest.mark.parametrize(("name", "place"), SHOWN)
def test_whole_text_is_in_sight(report: dict[str, Any], name: str, place: str) -> None:
    shown, node = report[name][place], EXPECTED[name][1]
    assert shown["found"], shown["text"]
    assert shown["visible"], shown["text"]
    assert shown["marked"] == [node]
