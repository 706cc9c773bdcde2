"""The whole path on the small model: checkpoint to FP4, ONNX, TensorRT plans, MODEL and picture.

Starts ComfyUI on the CPU, sends the full-pipeline workflow to its HTTP API, samples the original
checkpoint with the same seeds through ComfyUI's own loader, writes demo.png and prints a table.

usage: demo.py --comfyui FOLDER --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from api_workflow import ApiWorkflow, api_from_ui
from comfy_server import ComfyClient, ComfyServer, PromptResult
from pack_import import ROOT, register_pack
from PIL import Image, ImageDraw, ImageFont
from small_model_files import DATA, DIFFUSION_MODEL, link_models
from small_workflow import (
    QUANTIZED_NAME,
    for_small_model,
    stage_seconds,
    with_original_model,
    with_prompt,
    write_calibration_pictures,
)

if TYPE_CHECKING:
    from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
    from flux_fp4.trt_runtime.manifest import EngineManifest

DIGITS = ("two", "three", "six", "eight")
PROMPTS = tuple(f"a handwritten digit {digit}" for digit in DIGITS)
SEED = 7
ENLARGE = 4
LABEL = 34
"""Height of a line of text in the picture, pixels."""


class DemoError(Exception):
    """A prompt did not end in a picture, or the engine is not what it should be."""


@dataclass
class Sampled:
    """Pictures of the prompts, from one model, and the seconds per node type."""

    pictures: list[Image.Image] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    register_pack()
    output = arguments.output.absolute()
    base = output / "comfyui"
    # Stages that are up to date would be skipped, and their seconds would say nothing.
    shutil.rmtree(base, ignore_errors=True)
    link_models(base)
    with ComfyServer(arguments.comfyui, base, ROOT) as server:
        write_calibration_pictures(base / "input")
        workflow = for_small_model(full_pipeline(server.client))
        original = sample(server.client, with_original_model(workflow), "original")
        engine = sample(server.client, workflow, "FP4 engine")
    contact_sheet(original.pictures, engine.pictures).save(output / "demo.png")
    complete = print_tables(base / "models" / "flux_fp4" / QUANTIZED_NAME, original, engine)
    print(f"\n{output / 'demo.png'}")
    if not complete:
        raise DemoError("the engine lacks FP4 GEMMs or FP8 attention, see the table")


def full_pipeline(client: ComfyClient) -> ApiWorkflow:
    """Return the shipped workflow that starts from a checkpoint, in API form."""
    path = ROOT / "workflows" / "flux_fp4_full_pipeline.json"
    return api_from_ui(json.loads(path.read_text()), client.object_info())


def sample(client: ComfyClient, workflow: ApiWorkflow, label: str) -> Sampled:
    """Run `workflow` once per prompt."""
    sampled = Sampled()
    for text in PROMPTS:
        prompt = with_prompt(workflow, text, SEED)
        result = client.run(prompt, timeout=600)
        sampled.pictures.append(picture(client, result))
        for name, seconds in stage_seconds(prompt, result.node_seconds).items():
            sampled.seconds[name] = sampled.seconds.get(name, 0.0) + seconds
        print(f"{label}: '{text}' in {result.seconds:.1f} s", flush=True)
    return sampled


def picture(client: ComfyClient, result: PromptResult) -> Image.Image:
    """Return the picture that a prompt saved."""
    if result.status != "success":
        raise DemoError(f"prompt {result.status}: {result.error_message}")
    (entry,) = result.images()
    return Image.open(BytesIO(client.image(entry))).convert("RGB")


def psnr_db(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures in dB."""
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    mean_square = float(np.mean(difference**2))
    return math.inf if mean_square == 0 else 10 * math.log10(255**2 / mean_square)


def contact_sheet(originals: list[Image.Image], engines: list[Image.Image]) -> Image.Image:
    """Lay out one row per prompt: original, FP4 engine; each enlarged, with labels."""
    side = originals[0].width * ENLARGE
    gap = LABEL // 4
    width = 2 * side + 3 * gap
    sheet = Image.new("RGB", (width, LABEL + len(PROMPTS) * (side + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=LABEL // 2)
    columns = (gap, side + 2 * gap)
    for left, text in zip(columns, ("original", "FP4 engine"), strict=True):
        draw.text((left, LABEL // 4), text, "black", font)
    for row, text in enumerate(PROMPTS):
        top = LABEL + row * (side + LABEL)
        quality = f"PSNR {psnr_db(originals[row], engines[row]):.1f} dB"
        draw.text((columns[0], top + side + 4), text, "black", font)
        draw.text((width - gap, top + side + 4), quality, "black", font, anchor="ra")
        for left, image in zip(columns, (originals[row], engines[row]), strict=True):
            enlarged = image.resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(enlarged, (left, top))
    return sheet


def print_tables(folder: Path, original: Sampled, engine: Sampled) -> bool:
    """Print sizes, times and quality; return whether the engine has all kernels it should have."""
    from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
    from flux_fp4.trt_runtime.manifest import MANIFEST, load_manifest

    checkpoint = QuantizedCheckpoint.read(folder / f"{QUANTIZED_NAME}.safetensors")
    (manifest_path,) = folder.glob(f"*/{MANIFEST}")
    manifest = load_manifest(manifest_path.parent)
    print(f"\n{'bytes':<34}{'':>14}")
    print(f"{'original checkpoint':<34}{(DATA / DIFFUSION_MODEL).stat().st_size:>14,}")
    print(f"{'quantized checkpoint':<34}{checkpoint.path.stat().st_size:>14,}")
    onnx_bytes = sum(path.stat().st_size for path in folder.glob("*.onnx"))
    print(f"{'ONNX files, without weights':<34}{onnx_bytes:>14,}")
    print(f"{'TensorRT plans':<34}{manifest.plan_bytes:>14,}")

    print(f"\n{'seconds, ' + str(len(PROMPTS)) + ' pictures':<34}{'original':>14}{'FP4':>14}")
    for name in {**engine.seconds, **original.seconds}:  # in the order of execution
        cells = (sampled.seconds.get(name) for sampled in (original, engine))
        print(f"{name:<34}" + "".join(f"{'' if s is None else f'{s:.2f}':>14}" for s in cells))

    formats = Counter(report.format for report in checkpoint.metadata.linears)
    print(f"\nrecipe {checkpoint.metadata.recipe}, Linears by format: {dict(formats)}")
    velocity_db = checkpoint.metadata.velocity_sqnr_db
    print(f"the original predicts the velocity of the calibration pictures at {velocity_db:.1f} dB")
    complete = print_blocks(checkpoint, manifest)

    print(f"\n{'picture':<34}{'PSNR':>14}")
    for text, first, second in zip(PROMPTS, original.pictures, engine.pictures, strict=True):
        print(f"{text:<34}{psnr_db(first, second):>11.1f} dB")
    return complete


def print_blocks(checkpoint: QuantizedCheckpoint, manifest: EngineManifest) -> bool:
    """Print each block's kernels and quality; return whether every expected kernel was found."""
    kinds = {"FP4 GEMMs": "fp4_gemms", "FP8 GEMMs": "fp8_gemms", "FP8 attention": "fp8_mha"}
    print(f"\n{'block':<20}" + "".join(f"{kind:>15}" for kind in kinds) + f"{'SQNR of update':>17}")
    sqnr_db = {report.name: report.update_sqnr_db for report in checkpoint.metadata.blocks}
    complete = True
    for entry in manifest.blocks:
        counts = [
            (getattr(entry, f"{kind}_found"), getattr(entry, f"{kind}_expected"))
            for kind in kinds.values()
        ]
        complete &= all(found == expected for found, expected in counts)
        cells = "".join(f"{f'{found} of {expected}':>15}" for found, expected in counts)
        print(f"{entry.block:<20}{cells}{sqnr_db[entry.block]:>14.1f} dB")
    return complete


if __name__ == "__main__":
    main()
