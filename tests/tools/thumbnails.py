"""Thumbnails of the shipped workflows: four pictures each, made by running them on the small model.

usage: thumbnails.py --comfyui FOLDER [workflow ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from io import BytesIO
from pathlib import Path

from api_workflow import ApiWorkflow, api_from_ui, nodes_of_type
from comfy_server import ComfyClient, ComfyServer
from demo import picture
from pack_import import ROOT
from PIL import Image, ImageOps
from small_model_files import link_models
from small_workflow import for_small_model, needs_engine, with_prompt
from workflow_inputs import write_small_models

SIDE = 256
"""Pixels of one picture in the thumbnail."""
SEED = 7
DIGITS = {
    "flux_fp4_full_pipeline": ("two", "three", "six", "eight"),
    "flux_fp4_load_engine": ("zero", "four", "five", "seven"),
    "flux_fp4_svdquant": ("one", "nine", "eight", "three"),
    "flux_fp4_lora": ("five", "six", "two", "zero"),
    "flux_fp4_merge_lora": ("three", "two", "six", "five"),
    "flux_fp4_kontext_edit": ("four", "nine", "zero", "six"),
    "flux_fp4_fill_inpaint": ("eight", "five", "seven", "two"),
    "flux_fp4_canny": ("seven", "one", "four", "five"),
    "flux_fp4_depth": ("nine", "two", "three", "seven"),
    "flux_fp4_controlnet_union": ("zero", "eight", "one", "four"),
    "flux_fp4_low_vram": ("six", "seven", "five", "nine"),
    "flux_fp4_schnell": ("three", "zero", "two", "six"),
}
"""What the thumbnail of each workflow shows; the others show what they measure."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("names", nargs="*", help="workflows to draw; all if there is none")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        link_models(base)
        with ComfyServer(arguments.comfyui, base, ROOT) as server:
            write_small_models(base)
            object_info = server.client.object_info()
            workflows = {
                path: for_small_model(api_from_ui(json.loads(path.read_text()), object_info))
                for path in (ROOT / "workflows").glob("*.json")
            }
            # the full pipeline builds the engine that others load
            for path in sorted(workflows, key=lambda p: needs_engine(workflows[p])):
                if arguments.names and path.stem not in arguments.names:
                    continue
                pictures = _pictures(server.client, path.stem, workflows[path])
                _thumbnail(pictures).save(path.with_suffix(".jpg"), quality=90)
                print(path.with_suffix(".jpg"))


def _pictures(client: ComfyClient, name: str, workflow: ApiWorkflow) -> list[Image.Image]:
    if name in DIGITS:
        runs = [with_prompt(workflow, f"a handwritten digit {d}", SEED) for d in DIGITS[name]]
        return [picture(client, client.run(run, 600)) for run in runs]
    result = client.run(workflow, 600)
    # times of the CPU reference would say nothing of the product
    charts = nodes_of_type(workflow, "FluxFP4SpeedLimit")
    if result.images() and not charts:
        return [picture(client, result)]
    charts += nodes_of_type(workflow, "FluxFP4Inspect")
    entries = (result.previews(chart)[0] for chart in charts[:1])
    return [Image.open(BytesIO(client.image(entry))).convert("RGB") for entry in entries]


def _thumbnail(pictures: list[Image.Image]) -> Image.Image:
    # around a chart or a grid, the colour of their background
    sheet = Image.new("RGB", (2 * SIDE, 2 * SIDE), "#1f1f1f")
    if len(pictures) == 1:
        whole = ImageOps.contain(pictures[0], sheet.size, Image.Resampling.BICUBIC)
        sheet.paste(whole, (0, (sheet.height - whole.height) // 2))
        return sheet
    for index, image in enumerate(pictures):
        enlarged = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        sheet.paste(enlarged, (index % 2 * SIDE, index // 2 * SIDE))
    return sheet


if __name__ == "__main__":
    main()
