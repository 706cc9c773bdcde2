"""The workflows that come with the pack, drawn from node definitions.

usage: shipped_workflows.py --comfyui FOLDER    writes workflows/*.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import workflow_notes as notes
from comfy_server import ComfyServer
from pack_import import ROOT
from small_model_files import link_models
from workflow_editing import canny, controlnet_union, depth, fill_inpaint, kontext_edit
from workflow_parts import (
    CALIBRATION_PROMPT,
    ENGINE,
    FRAMES,
    PROMPT,
    SEED,
    Loaded,
    begin,
    begin_with_text,
    below,
    calibrate,
    custom_sampler,
    engine_from,
    make,
    next_to,
    right_of,
    text,
)
from workflow_sheet import Output, Sheet

DEV = "flux1-dev.safetensors"
LORA_TRIGGER = "my trigger word, "


def full_pipeline(sheet: Sheet) -> None:
    """Every stage as a node of its own."""
    loaded = begin(sheet, notes.FULL_PIPELINE, 420)
    samples = calibrate(sheet, loaded)
    with sheet.frame("2  Quantize, export, build (once)", "make"):
        engine = make(sheet, samples, checkpoint=DEV, name="flux1-dev-nvfp4")
    with sheet.frame("3  Sample", "sample"):
        column = sheet.column(FRAMES, below(sheet))
        model = column.put("FluxFP4LoadEngine", engine=engine)["model"]
        conditioning = text(column, loaded.clip, PROMPT)
        custom_sampler(next_to(column), loaded, model, conditioning, "flux_fp4")


def merge_lora(sheet: Sheet) -> None:
    """A LoRA merged before quantizing."""
    loaded = begin(sheet, notes.MERGE_LORA, 480)
    samples = calibrate(sheet, loaded, LORA_TRIGGER + CALIBRATION_PROMPT)
    with sheet.frame("2  Merge", "make"):
        column = sheet.column(right_of(sheet))
        model = column.put("UNETLoader", unet_name=DEV)["MODEL"]
        merged = column.put("LoraLoaderModelOnly", model=model, lora_name="my_lora.safetensors")
    with sheet.frame("3  Quantize, export, build (once)", "make"):
        engine = make(
            sheet,
            samples,
            "FluxFP4QuantizeModel",
            model=merged["MODEL"],
            name="flux1-dev-my-lora-nvfp4",
        )
    with sheet.frame("4  Sample", "sample"):
        column = sheet.column(FRAMES, below(sheet))
        model = column.put("FluxFP4LoadEngine", engine=engine)["model"]
        conditioning = text(column, loaded.clip, LORA_TRIGGER + PROMPT)
        custom_sampler(next_to(column), loaded, model, conditioning, "flux_fp4_merged_lora")


def svdquant(sheet: Sheet) -> None:
    """A branch in high precision beside every Linear, all stages in one node."""
    loaded = begin(sheet, notes.SVDQUANT, 400)
    samples = calibrate(sheet, loaded)
    model = engine_from(
        sheet, DEV, samples, "2  SVDQuant engine (once)", recipe="nvfp4-svdquant-r32"
    )
    _sample(sheet, loaded, model, "flux_fp4_svdquant")


def load_engine(sheet: Sheet) -> None:
    """Text to image with a finished engine."""
    loaded = begin(sheet, notes.LOAD_ENGINE, 330)
    column = sheet.column(FRAMES)
    model = column.put("FluxFP4LoadEngine", engine=ENGINE)["model"]
    conditioning = text(column, loaded.clip, PROMPT)
    custom_sampler(next_to(column), loaded, model, conditioning, "flux_fp4")


def lora(sheet: Sheet) -> None:
    """A LoRA behind a finished engine."""
    loaded = begin(sheet, notes.LORA, 400)
    column = sheet.column(FRAMES)
    engine = column.put("FluxFP4LoadEngine", engine=ENGINE)["model"]
    patched = column.put("LoraLoaderModelOnly", model=engine, lora_name="my_lora.safetensors")
    conditioning = text(column, loaded.clip, LORA_TRIGGER + PROMPT)
    custom_sampler(next_to(column), loaded, patched["MODEL"], conditioning, "flux_fp4_lora")


def low_vram(sheet: Sheet) -> None:
    """Everything that saves GPU memory."""
    loaded = begin(sheet, notes.LOW_VRAM, 480)
    samples = calibrate(sheet, loaded)
    model = engine_from(
        sheet,
        DEV,
        samples,
        "2  Small engine (once)",
        recipe="nvfp4-mse",
        modulation="nvfp4",
        max_megapixels=1.0,
        modulation_memory="main memory",
        engine_memory=3.0,
    )
    _sample(sheet, loaded, model, "flux_fp4_low_vram")


def schnell(sheet: Sheet) -> None:
    """FLUX.1 schnell in four steps."""
    loaded = begin(sheet, notes.SCHNELL, 360)
    samples = calibrate(sheet, loaded, guidance=None)
    model = engine_from(sheet, "flux1-schnell.safetensors", samples, "2  Engine (once)")
    with sheet.frame("3  Sample", "sample"):
        column = sheet.column(FRAMES, below(sheet))
        conditioning = text(column, loaded.clip, PROMPT, guidance=None)
        custom_sampler(next_to(column), loaded, model, conditioning, "flux_fp4_schnell", steps=4)


def compare(sheet: Sheet) -> None:
    """The engine beside its original, step by step and picture by picture."""
    loaded = begin(sheet, notes.COMPARE, 420)
    with sheet.frame("1  Along the steps", "compare"):
        column = sheet.column(FRAMES)
        reference = column.put("UNETLoader", unet_name=DEV)["MODEL"]
        tested = column.put("FluxFP4LoadEngine", engine=ENGINE)["model"]
        conditioning = text(column, loaded.clip, PROMPT)
        compared = next_to(column)
        latent = compared.put("EmptySD3LatentImage", width=1024, height=1024, batch_size=2)
        drawn = compared.put(
            "FluxFP4CompareModels",
            reference=reference,
            tested=tested,
            positive=conditioning,
            latent=latent["LATENT"],
            seed=SEED,
            sampler_name="euler",
        )
        next_to(compared).put("PreviewAny", "Errors by step", source=drawn["report"])
    with sheet.frame("2  In the pictures", "compare"):
        column = sheet.column(FRAMES, below(sheet))
        pictures = [
            column.put("VAEDecode", title, samples=drawn[output], vae=loaded.vae)["IMAGE"]
            for title, output in (
                ("Of the original", "reference latent"),
                ("Of the engine", "tested latent"),
            )
        ]
        metrics = next_to(column)
        measured = metrics.put("FluxFP4CompareImages", original=pictures[0], quantized=pictures[1])
        report = next_to(metrics)
        report.put("PreviewAny", "Metrics", source=measured["report"])
        grid = next_to(report)
        grid.put("SaveImage", images=measured["grid"], filename_prefix="flux_fp4_compare")


def benchmark(sheet: Sheet) -> None:
    """The engine beside its original, in time."""
    _, clip = begin_with_text(sheet, notes.BENCHMARK, 420)
    with sheet.frame("1  What is possible", "compare"):
        column = sheet.column(FRAMES)
        limit = column.put("FluxFP4SpeedLimit", gpu="GeForce RTX 5090")
        next_to(column).put("PreviewAny", "Limit", size=(560, 360), source=limit["report"])
    with sheet.frame("2  What is measured", "compare"):
        column = sheet.column(FRAMES, below(sheet))
        engine = column.put("FluxFP4LoadEngine", engine=ENGINE)["model"]
        original = column.put("UNETLoader", "In bf16", unet_name=DEV)["MODEL"]
        fp8 = column.put("UNETLoader", "In FP8", unet_name=DEV, weight_dtype="fp8_e4m3fn_fast")
        measured = next_to(column)
        conditioning = text(measured, clip, PROMPT)
        latent = measured.put("EmptySD3LatentImage", width=1024, height=1024)
        figures = next_to(measured)
        taken = figures.put(
            "FluxFP4Benchmark",
            tested=engine,
            positive=conditioning,
            latent=latent["LATENT"],
            baseline=original,
            third=fp8["MODEL"],
        )
        report = next_to(figures)
        report.put("PreviewAny", "Times", size=(560, 280), source=taken["report"])
        report.put("SaveImage", images=taken["chart"], filename_prefix="flux_fp4_benchmark")


def batch_build(sheet: Sheet) -> None:
    """Several checkpoints in one queue."""
    loaded = begin(sheet, notes.BATCH_BUILD, 420)
    samples = calibrate(sheet, loaded, title="1  Calibrate once")
    for number, checkpoint in enumerate(("flux1-dev", "flux1-krea-dev", "my-finetune"), start=2):
        with sheet.frame(f"{number}  {checkpoint}", "make"):
            column = sheet.column(FRAMES, below(sheet))
            quantized = column.put(
                "FluxFP4Quantize",
                checkpoint=f"{checkpoint}.safetensors",
                samples=samples,
                name=f"{checkpoint}-nvfp4",
                recipe="nvfp4-mse",
            )
            column = next_to(column)
            exported = column.put("FluxFP4ExportONNX", checkpoint=quantized["checkpoint"])
            column = next_to(column)
            built = column.put("FluxFP4BuildEngine", checkpoint=exported["checkpoint"])
            next_to(column).put("FluxFP4Inspect", "Quality", checkpoint=built["engine"])


def _sample(sheet: Sheet, loaded: Loaded, model: Output, prefix: str) -> None:
    with sheet.frame("3  Sample", "sample"):
        column = sheet.column(FRAMES, below(sheet))
        conditioning = text(column, loaded.clip, PROMPT)
        custom_sampler(next_to(column), loaded, model, conditioning, prefix)


WORKFLOWS: Mapping[str, Callable[[Sheet], None]] = {
    "flux_fp4_full_pipeline": full_pipeline,
    "flux_fp4_load_engine": load_engine,
    "flux_fp4_svdquant": svdquant,
    "flux_fp4_lora": lora,
    "flux_fp4_merge_lora": merge_lora,
    "flux_fp4_kontext_edit": kontext_edit,
    "flux_fp4_fill_inpaint": fill_inpaint,
    "flux_fp4_canny": canny,
    "flux_fp4_depth": depth,
    "flux_fp4_controlnet_union": controlnet_union,
    "flux_fp4_low_vram": low_vram,
    "flux_fp4_compare": compare,
    "flux_fp4_benchmark": benchmark,
    "flux_fp4_schnell": schnell,
    "flux_fp4_batch_build": batch_build,
}


def drawn(name: str, object_info: Mapping[str, Any]) -> str:
    """Return the file of a workflow."""
    sheet = Sheet(object_info, name)
    WORKFLOWS[name](sheet)
    return json.dumps(sheet.saved(), indent=1) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        link_models(Path(folder))
        with ComfyServer(arguments.comfyui, Path(folder), ROOT) as server:
            object_info = server.client.object_info()
    for name in WORKFLOWS:
        (ROOT / "workflows" / f"{name}.json").write_text(drawn(name, object_info))


if __name__ == "__main__":
    main()
