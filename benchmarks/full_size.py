"""Seconds and memory of every stage on a FLUX.1-dev of true size with random weights.

    python benchmarks/full_size.py FOLDER source              the checkpoint, 23.8 GB
    python benchmarks/full_size.py FOLDER calibrate           statistics of a few small samples
    python benchmarks/full_size.py FOLDER quantize RECIPE [--modulation nvfp4]
    python benchmarks/full_size.py FOLDER blocks RECIPE       two blocks of each kind only
    python benchmarks/full_size.py FOLDER export RECIPE
    python benchmarks/full_size.py FOLDER build RECIPE

Each call runs one stage in a process of its own and appends a line to FOLDER/results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import struct
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from pack_import import register_pack  # noqa: E402

register_pack()

from flux_fp4.quant.block_quantizer import quantize_block  # noqa: E402
from flux_fp4.quant.calibration import Conditioning, rectified_flow_samples  # noqa: E402
from flux_fp4.quant.flux.config import FluxConfig, block_linears  # noqa: E402
from flux_fp4.quant.flux.model import tensor_shapes  # noqa: E402
from flux_fp4.quant.onnx_export import export_blocks  # noqa: E402
from flux_fp4.quant.quantize import quantize_checkpoint  # noqa: E402
from flux_fp4.quant.recipe import QuantizeOptions, named_recipe  # noqa: E402
from flux_fp4.quant.roofline.published import PUBLISHED  # noqa: E402
from flux_fp4.quant.sources.source import open_source  # noqa: E402
from flux_fp4.quant.stack import (  # noqa: E402
    block_statistics,
    block_with_weights,
    collect_statistics,
    compute_dtype,
)
from flux_fp4.quant.statistics_files import StatisticsFolder  # noqa: E402
from flux_fp4.trt_runtime.builder import build_engine  # noqa: E402
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile  # noqa: E402

FLUX1_DEV = PUBLISHED["flux1-dev"]
SAMPLES, SIDE, TEXT_TOKENS = 4, 32, 64
"""Random weights need no good samples: four of 16x16 image tokens (256x256 pixels)."""

STAGES = ("source", "calibrate", "quantize", "blocks", "export", "build")

_SAMPLING_SECONDS = 0.05


class MemoryMeter:
    """Samples this process's and its children's memory from /proc while a stage runs."""

    def __init__(self) -> None:
        self.peak_anonymous = self.peak_resident = self.peak_child = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryMeter:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()
        # the kernel's own maximum: this thread sleeps while native code holds Python's lock
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        self.peak_resident = max(self.peak_resident, peak)

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLING_SECONDS):
            anonymous, resident = _memory("self")
            self.peak_anonymous = max(self.peak_anonymous, anonymous)
            self.peak_resident = max(self.peak_resident, resident)
            for child in _children():
                self.peak_child = max(self.peak_child, _memory(child)[1])


def _children() -> list[str]:
    children = []
    for task in Path("/proc/self/task").iterdir():
        # a thread may end between being listed and being read
        with suppress(OSError):
            children += (task / "children").read_text().split()
    return children


def _memory(process: str) -> tuple[int, int]:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    return int(sizes.get("RssAnon", 0)) << 10, int(sizes.get("VmRSS", 0)) << 10


def write_source(path: Path, config: FluxConfig = FLUX1_DEV) -> None:
    """Write distinct random weights, one tensor in memory at a time."""
    header, end = {}, 0
    shapes = tensor_shapes(config)
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            tensor = torch.empty(shape, dtype=torch.bfloat16)
            if name.endswith(".scale"):
                tensor.fill_(1.0)
            else:
                tensor.normal_(std=shape[-1] ** -0.5, generator=generator)
            file.write(tensor.view(torch.uint8).numpy().data)


def samples():
    """Return the calibration samples."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(SAMPLES, 16, SIDE, SIDE, generator=generator)
    context = torch.randn(1, TEXT_TOKENS, 4096, generator=generator)
    pooled = torch.randn(1, 768, generator=generator)
    return rectified_flow_samples(latents, [Conditioning(context, pooled, 3.5)], 1, seed=0)


def run(folder: Path, stage: str, recipe: str, modulation: str) -> None:
    """Run one stage."""
    source_path = folder / "source.safetensors"
    name = recipe if modulation == "bf16" else f"{recipe}-{modulation}-modulation"
    checkpoint = folder / name / f"{name}.safetensors"
    if stage == "source":
        write_source(source_path)
    elif stage == "calibrate":
        source, calibration = open_source(source_path), samples()
        statistics = StatisticsFolder(folder / "statistics", source.digest(), calibration.digest())
        collect_statistics(source, calibration, statistics, show, "cpu", compute_dtype("cpu"))
    elif stage == "quantize":
        options = QuantizeOptions(recipe=named_recipe(recipe), modulation=modulation)
        source = open_source(source_path)
        quantize_checkpoint(source, checkpoint, samples(), options, folder / "statistics", show)
    elif stage == "blocks":
        time_blocks(folder, recipe)
    elif stage == "export":
        export_blocks(checkpoint, show)
    else:
        profile = ShapeProfile(max_batch=1, max_img_tokens=4096, max_txt_tokens=512)
        build_engine(checkpoint.parent, BuildSpec(profile=profile), show, 2)


@torch.inference_mode()
def time_blocks(folder: Path, recipe: str) -> None:
    """Quantize two blocks of each kind; all blocks of a kind take the same time."""
    source, options = (
        open_source(folder / "source.safetensors"),
        QuantizeOptions(recipe=named_recipe(recipe)),
    )
    statistics = StatisticsFolder(folder / "statistics", source.digest(), samples().digest())
    total = 0.0
    for kind, count in (("double", FLUX1_DEV.depth), ("single", FLUX1_DEV.depth_single_blocks)):
        times = []
        # the first one pays for imports
        for index in (2, 3, 4):
            started = time.monotonic()
            name = f"{kind}_blocks.{index}"
            tensors, linears = source.submodule(name), block_linears(name)
            quantize_block(
                name,
                block_with_weights(name, source.config, tensors, compute_dtype("cpu")),
                {linear: tensors[f"{linear}.weight"] for linear in linears},
                dict.fromkeys(linears),
                block_statistics(statistics, name),
                options,
                {linear: options.recipe.format_of(f"{name}.{linear}") for linear in linears},
                source.config.head_dim,
                lambda: None,
            )
            times.append(time.monotonic() - started)
        print(f"{kind} block: {', '.join(f'{seconds:.1f}' for seconds in times)} s")
        total += count * sum(times[1:]) / 2
    print(f"all blocks at this pace: {total:.0f} s")


def show(phase: str, done: int, total: int) -> None:
    """Print progress on one line."""
    print(f"\r{phase:<50} {done}/{total}", end="", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("recipe", nargs="?", default="")
    parser.add_argument("--modulation", default="bf16")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with MemoryMeter() as meter:
        started = time.monotonic()
        run(arguments.folder, arguments.stage, arguments.recipe, arguments.modulation)
        seconds = time.monotonic() - started
    row = {
        "stage": arguments.stage,
        "recipe": arguments.recipe,
        "modulation": arguments.modulation,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(os.times()[:4]), 1),
        "peak_resident_gb": round(meter.peak_resident / 1e9, 2),
        "peak_anonymous_gb": round(meter.peak_anonymous / 1e9, 2),
        "peak_worker_gb": round(meter.peak_child / 1e9, 2),
    }
    with (arguments.folder / "results.jsonl").open("a") as results:
        results.write(json.dumps(row) + "\n")
    print("\n" + json.dumps(row))


if __name__ == "__main__":
    main()
