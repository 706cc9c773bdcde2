"""What baking a LoRA costs, on one block of each kind at FLUX.1-dev's size.

    COMFYUI_PATH=... python benchmarks/baked_lora.py FOLDER    writes 3 GB there first

Seconds to merge and quantize a block again, with every Linear under a LoRA of rank 16, to export
it, and to build its plan; bytes that stay on disk. Statistics and engine are made before the clock
runs, from random weights and samples: a recipe's time does not depend on their values.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from comfy_in_process import import_comfyui  # noqa: E402
from pack_import import register_pack  # noqa: E402

register_pack()
import_comfyui()

import comfy.weight_adapter  # noqa: E402, TID251  # as a user's LoRA comes
from flux_fp4.nodes.changed_source import ChangedSource  # noqa: E402
from flux_fp4.quant.changed_blocks import quantize_changed_blocks  # noqa: E402
from flux_fp4.quant.flux.config import block_linears  # noqa: E402
from flux_fp4.quant.onnx_export import export_blocks  # noqa: E402
from flux_fp4.quant.quantize import quantize_checkpoint  # noqa: E402
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint  # noqa: E402
from flux_fp4.quant.sources.source import FluxSource, open_source  # noqa: E402
from flux_fp4.trt_runtime.builder import build_engine  # noqa: E402
from flux_fp4.trt_runtime.selection import BakedBlocks, Selection  # noqa: E402
from flux_fp4.trt_runtime.spec import BuildSpec  # noqa: E402
from flux_fp4.trt_runtime.variant_plans import build_selected  # noqa: E402
from full_size_blocks import CONFIG  # noqa: E402
from quantize_tiny import with_recipe  # noqa: E402
from tiny_flux import ignore_progress, random_flux, random_samples, save_flux  # noqa: E402

RANK = 16


def prepared(folder: Path, recipe: str) -> tuple[FluxSource, QuantizedCheckpoint]:
    """Make what a user has already: the source, its quantized checkpoint, and an engine."""
    file = folder / "source.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        save_flux(random_flux(CONFIG), file)
    source, path = open_source(file), folder / recipe / f"{recipe}.safetensors"
    checkpoint = quantize_checkpoint(
        source,
        path,
        random_samples(CONFIG),
        with_recipe(recipe),
        folder / "statistics",
        ignore_progress,
    )
    export_blocks(path, ignore_progress)
    build_engine(path.parent, BuildSpec(), ignore_progress)
    return source, checkpoint


def with_lora(source: FluxSource, block: str) -> ChangedSource:
    """Put a LoRA on every Linear of a block, in the form in which ComfyUI holds it."""
    generator = torch.Generator().manual_seed(0)
    patches = {}
    for linear in block_linears(block):
        rows, columns = source.shapes[f"{block}.{linear}.weight"]
        up = torch.randn(rows, RANK, generator=generator)
        down = torch.randn(RANK, columns, generator=generator)
        weights = (up, down, 1.0, None, None, None)
        adapter = comfy.weight_adapter.LoRAAdapter(set(), weights)
        patches[f"{block}.{linear}"] = [(0.01, adapter, 1.0, None, None)]
    return ChangedSource(source, patches, f"{block} {time.time_ns()}")


def bake(source: FluxSource, checkpoint: QuantizedCheckpoint, folder: Path, block: str) -> str:
    """Bake one block and return a table row."""
    baked = BakedBlocks(checkpoint.path.parent / "baked" / block, (block,))
    path = baked.folder / "blocks.safetensors"
    times = [time.monotonic()]
    quantize_changed_blocks(
        with_lora(source, block),
        checkpoint,
        (block,),
        path,
        folder / "statistics",
        ignore_progress,
    )
    times.append(time.monotonic())
    export_blocks(path, ignore_progress)
    times.append(time.monotonic())
    engine_dir = checkpoint.path.parent / BuildSpec().folder_name
    build_selected(engine_dir, Selection(baked=baked), ignore_progress)
    times.append(time.monotonic())
    seconds = [f"{after - before:.1f}" for before, after in pairwise(times)]
    size = sum(file.stat().st_size for file in baked.folder.rglob("*") if file.is_file())
    return f"| {checkpoint.metadata.recipe} | {block} | {' | '.join(seconds)} | {size / 1e6:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipes", nargs="*", default=["nvfp4-max"])
    arguments = parser.parse_args()
    print("| recipe | block | quantize, s | export, s | build, s | MB |\n|---|---|---|---|---|---|")
    for recipe in arguments.recipes:
        source, checkpoint = prepared(arguments.folder, recipe)
        for block in CONFIG.block_names:
            print(bake(source, checkpoint, arguments.folder, block), flush=True)


if __name__ == "__main__":
    main()
