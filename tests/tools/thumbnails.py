"""Thumbnails of the shipped workflows: four pictures each, made by running them on the small model.

usage: thumbnails.py --comfyui FOLDER
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from api_workflow import ApiWorkflow, api_from_ui, the_node
from comfy_server import ComfyServer
from demo import picture
from pack_import import ROOT
from PIL import Image
from small_lora import write_small_lora
from small_model_files import link_models
from small_workflow import (
    QUANTIZED_NAME,
    for_small_model,
    has_full_pipeline,
    with_prompt,
    write_calibration_pictures,
)

SIDE = 256
"""Pixels of one picture in the thumbnail."""
SEED = 7
DIGITS = {
    "flux_fp4_full_pipeline": ("two", "three", "six", "eight"),
    "flux_fp4_load_engine": ("zero", "four", "five", "seven"),
    "flux_fp4_merge_lora": ("three", "two", "six", "five"),
}
"""What the thumbnail of each workflow shows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        link_models(base)
        with ComfyServer(arguments.comfyui, base, ROOT) as server:
            write_calibration_pictures(base / "input")
            write_small_lora(base / "models" / "loras")
            object_info = server.client.object_info()
            workflows = {
                path: api_from_ui(json.loads(path.read_text()), object_info)
                for path in (ROOT / "workflows").glob("*.json")
            }
            # workflows that build an engine come first, the others load one
            for path in sorted(workflows, key=lambda p: not has_full_pipeline(workflows[p])):
                workflow = workflows[path]
                runs = [_for_digit(workflow, digit) for digit in DIGITS[path.stem]]
                pictures = [picture(server.client, server.client.run(run, 600)) for run in runs]
                _thumbnail(pictures).save(path.with_suffix(".jpg"), quality=90)
                print(path.with_suffix(".jpg"))


def _for_digit(workflow: ApiWorkflow, digit: str) -> ApiWorkflow:
    small = for_small_model(workflow)
    if not has_full_pipeline(small):
        engine = f"{QUANTIZED_NAME}/sm120"
        small[the_node(small, "FluxFP4LoadEngine")]["inputs"]["engine"] = engine
    return with_prompt(small, f"a handwritten digit {digit}", SEED)


def _thumbnail(pictures: list[Image.Image]) -> Image.Image:
    sheet = Image.new("RGB", (2 * SIDE, 2 * SIDE))
    for index, image in enumerate(pictures):
        enlarged = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        sheet.paste(enlarged, (index % 2 * SIDE, index // 2 * SIDE))
    return sheet


if __name__ == "__main__":
    main()
