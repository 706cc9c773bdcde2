"""Every kind of recipe and source through the nodes of a real ComfyUI, to a picture."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from api_workflow import ApiWorkflow, the_node
from comfy_server import ComfyClient, ComfyServer, PromptResult
from pipeline_runs import (
    FULL_PIPELINE,
    MERGE_LORA,
    changed,
    executed,
    files,
    interrupt_at_text,
    picture,
    psnr_db,
    shipped,
    up_to,
)
from small_lora import write_small_lora
from small_workflow import (
    MERGED_NAME,
    with_original_model,
    with_prompt,
    write_calibration_pictures,
)

BLOCKS = [f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(4)]

SLOW_RECIPE = """\
name: slow
summary: Fits every branch seventeen times, so that there is time to cancel.
linears: nvfp4
low_rank:
  rank: 64
  method: full
  refinements: 16
"""

EIGHT_BIT_MLPS = """\
name: eight-bit-mlps
summary: Second Linears of MLPs in FP8, everything else in NVFP4.
linears: nvfp4
overrides:
  - linears: ["*_mlp.2"]
    format: fp8
"""


@pytest.fixture(scope="module")
def models(server: ComfyServer) -> Path:
    """The folder of quantized checkpoints, empty at first; pictures and LoRA are in place."""
    write_calibration_pictures(server.base / "input")
    write_small_lora(server.base / "models" / "loras")
    folder = server.base / "models" / "flux_fp4"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def recipes(models: Path) -> Path:
    """The folder of the user's own recipes."""
    folder = models / "recipes"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def pipeline(models: Path, object_info: dict[str, Any]) -> ApiWorkflow:
    return shipped(FULL_PIPELINE, object_info)


def quantizing(workflow: ApiWorkflow, name: str, recipe: str, **inputs: Any) -> ApiWorkflow:
    return changed(workflow, "FluxFP4Quantize", name=name, recipe=recipe, **inputs)


def report(workflow: ApiWorkflow, result: PromptResult) -> str:
    assert (result.status, result.error_message) == ("success", "")
    return result.text(the_node(workflow, "FluxFP4Inspect"))


# Each recipe on the GPU generation that it is for: what the report says, and the picture.


@pytest.mark.parametrize(
    ("recipe", "target", "inputs", "told", "least_psnr_db"),
    [
        (
            "nvfp4-svdquant-r16",
            "sm120",
            {"percentile": 99.9, "headroom": 1.5},
            [
                "Linears: 24 in NVFP4; attention in FP8, modulation in bf16",
                "activation scales: percentile 99.9, headroom 1.5",
                "FP4 GEMMs 24 of 24, FP8 attention 6 of 6",
            ],
            18,
        ),
        (
            "fp8",
            "sm89",
            {"modulation": "fp8"},
            [
                "Linears: 24 in FP8; attention in FP8, modulation in FP8",
                "FP8 GEMMs 24 of 24, FP8 attention 6 of 6",
            ],
            28,
        ),
        (
            "bf16",
            "sm86",
            {"fp8_attention": False},
            ["Linears: 24 in bf16; attention in bf16", "no Linear is quantized", "everything in"],
            50,
        ),
    ],
    ids=["svdquant", "fp8", "bf16"],
)
def test_recipe_makes_nearly_the_original_picture(
    client: ComfyClient,
    pipeline: ApiWorkflow,
    recipe: str,
    target: str,
    inputs: dict[str, Any],
    told: list[str],
    least_psnr_db: float,
) -> None:
    workflow = quantizing(pipeline, f"made-{recipe}", recipe, **inputs)
    workflow = changed(workflow, "FluxFP4BuildEngine", target=target)
    result = client.run(workflow)
    text = report(workflow, result)
    for line in told:
        assert line in text
    assert re.search(r"predicts the velocity of the calibration pictures at [4-9]\.\d dB", text)
    original = picture(client, client.run(with_original_model(pipeline)))
    db = psnr_db(picture(client, result), original)
    assert db > least_psnr_db, f"{recipe}: {db:.1f} dB"


def test_auto_spends_more_for_a_higher_floor(client: ComfyClient, pipeline: ApiWorkflow) -> None:
    in_nvfp4 = []
    for floor_db in (15.0, 25.0):
        workflow = quantizing(
            pipeline, f"auto-{floor_db:g}", "auto", quality_floor=floor_db, fp8_attention=False
        )
        text = report(workflow, client.run(workflow))
        updates = [float(db) for db in re.findall(r"_blocks\.\d +(\d+\.\d) dB\n", text)]
        assert len(updates) == len(BLOCKS)
        # noises of Linears add up nearly, not exactly
        assert min(updates) > floor_db - 0.5, updates
        in_nvfp4.append(int(re.search(r"Linears: (\d+) in NVFP4", text)[1]))
        kernels = re.search(r"FP4 GEMMs (\d+) of \1\b", text)
        assert int(kernels[1]) == in_nvfp4[-1]
    assert in_nvfp4[0] > in_nvfp4[1] > 0


def test_recipe_that_the_target_cannot_run_is_refused_with_one_that_it_can(
    client: ComfyClient, pipeline: ApiWorkflow
) -> None:
    workflow = quantizing(pipeline, "made-nvfp4-max", "nvfp4-max")
    build = up_to(changed(workflow, "FluxFP4BuildEngine", target="sm89"), "FluxFP4BuildEngine")
    result = client.run(build)
    assert result.status == "error"
    assert "recipe 'fp8'" in result.error_message


# A LoRA merged into a MODEL.


def test_merged_lora_shows_in_the_engine(
    client: ComfyClient, object_info: dict[str, Any], models: Path
) -> None:
    workflow = with_prompt(shipped(MERGE_LORA, object_info), "a handwritten digit nine", seed=7)
    result = client.run(workflow)
    engine = picture(client, result)
    stock = with_original_model(workflow)
    with_lora = picture(client, client.run(stock))
    without = changed(stock, "LoraLoaderModelOnly", strength_model=0.0)
    plain = picture(client, client.run(without))
    effect_db, engine_db = psnr_db(plain, with_lora), psnr_db(engine, with_lora)
    assert effect_db < 20, f"the LoRA hardly shows: {effect_db:.1f} dB"
    assert engine_db > effect_db + 3, f"{engine_db:.1f} dB, without the LoRA {effect_db:.1f} dB"
    assert f"{MERGED_NAME}.safetensors" in files(models / MERGED_NAME)
    assert "quantized from MODEL (model)" in report(workflow, result)
    # another strength is another model: nothing of the old one is taken over
    weaker = up_to(
        changed(workflow, "LoraLoaderModelOnly", strength_model=0.5), "FluxFP4QuantizeModel"
    )
    texts = client.run(weaker).phases(the_node(weaker, "FluxFP4QuantizeModel"))
    assert {f"Calibrating {block}" for block in BLOCKS} <= set(texts)


def test_engine_is_no_model_to_quantize(
    client: ComfyClient, object_info: dict[str, Any], models: Path
) -> None:
    workflow = shipped(MERGE_LORA, object_info)
    assert client.run(workflow).status == "success"
    loader = the_node(workflow, "FluxFP4LoadEngine")
    workflow[loader]["inputs"]["engine"] = f"{MERGED_NAME}/sm120"
    again = changed(workflow, "FluxFP4QuantizeModel", model=[loader, 0], name="again")
    result = client.run(up_to(again, "FluxFP4QuantizeModel"))
    assert "it is a TensorRT engine already" in result.error_message


# Recipes of the user's own.


def test_own_recipe_is_offered_and_followed(
    client: ComfyClient, pipeline: ApiWorkflow, recipes: Path
) -> None:
    file = recipes / "eight-bit-mlps.yaml"
    file.write_text(EIGHT_BIT_MLPS)
    inputs = client.object_info()["FluxFP4Quantize"]["input"]["required"]
    assert inputs["recipe"][1]["options"][-1] == "eight-bit-mlps"
    workflow = quantizing(pipeline, "own", "eight-bit-mlps")
    workflow = changed(
        workflow, "FluxFP4Inspect", checkpoint=[the_node(workflow, "FluxFP4Quantize"), 0]
    )
    workflow = up_to(workflow, "FluxFP4Inspect")
    text = report(workflow, client.run(workflow))
    assert "Linears: 20 in NVFP4, 4 in FP8" in text
    assert re.search(r"double_blocks\.1\.txt_mlp\.2 +FP8 ", text)
    # an edited file is noticed, although no input of the node changed
    file.write_text(EIGHT_BIT_MLPS.replace("*_mlp.2", "*_mlp.*"))
    assert "Linears: 16 in NVFP4, 8 in FP8" in report(workflow, client.run(workflow))


def test_own_recipe_with_an_unknown_key_is_refused(
    client: ComfyClient, pipeline: ApiWorkflow, recipes: Path
) -> None:
    (recipes / "wrong.yaml").write_text("name: wrong\nsummary: s\nlinears: nvfp4\nspeed: 11\n")
    result = client.run(up_to(quantizing(pipeline, "own", "wrong"), "FluxFP4Quantize"))
    assert result.status == "error"
    assert "'wrong.yaml' cannot be used: speed: Extra inputs" in result.error_message
    assert "Correct the file or choose another recipe" in result.error_message


# Cancel, and go on.


def test_cancelled_quantization_goes_on(
    client: ComfyClient, pipeline: ApiWorkflow, models: Path, recipes: Path
) -> None:
    (recipes / "slow.yaml").write_text(SLOW_RECIPE)
    name = "cancelled"
    workflow = up_to(quantizing(pipeline, name, "slow"), "FluxFP4Quantize")
    node = the_node(workflow, "FluxFP4Quantize")
    handler = interrupt_at_text(client, node, "Quantizing single_blocks.0")
    result = client.run(workflow, on_event=handler)
    assert result.status == "interrupted"
    assert handler.times["ended"] - handler.times["interrupt"] < 2
    assert f"{name}.safetensors" not in files(models / name)
    offered = client.object_info()["FluxFP4ExportONNX"]["input"]["required"]["checkpoint"][1]
    assert name not in offered["options"]
    again = client.run(workflow)
    assert again.status == "success"
    texts = again.phases(node)
    assert [text for text in texts if text.startswith("Keeping")] == [
        f"Keeping {block}, finished earlier" for block in BLOCKS[:2]
    ]
    assert [text for text in texts if text.startswith("Quantizing")] == [
        f"Quantizing {block}" for block in BLOCKS[2:]
    ]
    assert not [text for text in texts if text.startswith("Calibrating")]
    left = files(models / name)
    assert f"{name}.safetensors" in left
    assert not [file for file in left if file.endswith((".partial", ".journal"))]


# The whole transformer as one ONNX file.


def test_whole_transformer_lies_beside_the_blocks(
    client: ComfyClient, pipeline: ApiWorkflow, models: Path
) -> None:
    workflow = quantizing(pipeline, "whole", "nvfp4-max")
    first = client.run(workflow)
    assert "transformer.onnx" not in files(models / "whole")
    workflow = changed(workflow, "FluxFP4ExportONNX", whole_transformer=True)
    second = client.run(workflow)
    assert "transformer.onnx: " in second.text(the_node(workflow, "FluxFP4ExportONNX"))
    model = onnx.load(models / "whole" / "transformer.onnx", load_external_data=False)
    assert [output.name for output in model.graph.output] == ["velocity"]
    assert "FluxFP4Quantize" not in executed(workflow, second)
    np.testing.assert_array_equal(picture(client, second), picture(client, first))


def test_whole_transformer_with_native_modulation_is_refused(
    client: ComfyClient, pipeline: ApiWorkflow
) -> None:
    workflow = quantizing(pipeline, "native-modulation", "nvfp4-max", modulation="nvfp4")
    workflow = changed(workflow, "FluxFP4ExportONNX", whole_transformer=True)
    result = client.run(up_to(workflow, "FluxFP4ExportONNX"))
    assert result.status == "error"
    assert "Choose 'bf16' or 'fp8' as 'modulation'" in result.error_message
