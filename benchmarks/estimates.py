"""What a trial says of a block of FLUX.1-dev's size, against what the block then takes.

    python benchmarks/estimates.py [RECIPE ...] [--rounds 2]

Weights are random. Every round runs the preflight's trial of a small part, then one block of each
kind in full, by the same code that quantizes a checkpoint; then the plans of both. So what else the
machine does falls on both, and only the ratio of measured to estimated is worth comparing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from pack_import import register_pack  # noqa: E402

register_pack()

from flux_fp4.quant import trial  # noqa: E402
from flux_fp4.quant.flux.config import FluxConfig  # noqa: E402
from flux_fp4.quant.flux.model import tensor_shapes  # noqa: E402
from flux_fp4.quant.nvfp4 import NVFP4Weight  # noqa: E402
from flux_fp4.quant.onnx_export import export_blocks  # noqa: E402
from flux_fp4.quant.quantize import quantize_checkpoint  # noqa: E402
from flux_fp4.quant.sources.source import FluxSource  # noqa: E402
from flux_fp4.trt_runtime.builder import build_engine  # noqa: E402
from flux_fp4.trt_runtime.durations import estimate, estimate_plan  # noqa: E402
from flux_fp4.trt_runtime.run_history import Run  # noqa: E402
from flux_fp4.trt_runtime.targets import build_spec  # noqa: E402
from quantize_tiny import with_recipe  # noqa: E402
from tiny_flux import TINY, ignore_progress  # noqa: E402

RECIPES = ("nvfp4-max", "nvfp4-mse", "nvfp4-awq", "nvfp4-svdquant-r32")
FULL = TINY.model_copy(
    update={
        "hidden_size": 3072,
        "num_heads": 24,
        "depth": 1,
        "depth_single_blocks": 1,
        "vec_in_dim": 768,
        "context_in_dim": 4096,
    }
)
SPEC = build_spec("sm120", 2, 1, 512)
Runs = dict[str, list[Run]]


class RandomSource(FluxSource):
    """Random weights in memory."""

    layout = "model"

    def __init__(self, config: FluxConfig) -> None:
        self.name, self.config, self.shapes = "random", config, tensor_shapes(config)
        generator = torch.Generator().manual_seed(0)
        self._tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if name.endswith(".scale")
            else torch.empty(shape, dtype=torch.bfloat16).normal_(
                std=shape[-1] ** -0.5, generator=generator
            )
            for name, shape in self.shapes.items()
        }
        self.size_bytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def tensors(self, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
        return {name: self._tensors[name].to(device) for name in names}

    def packed(self, linear: str, device: str = "cpu") -> NVFP4Weight | None:
        return None

    def digest(self) -> str:
        return "random"


def recorded(runs: Runs):
    """Return a ``Record`` that adds to runs."""
    return lambda work, units, seconds: runs.setdefault(work, []).append(Run(units, seconds))


def round_of(source: RandomSource, recipe: str) -> tuple[Runs, Runs]:
    """Return the runs of a trial and those in full."""
    options, tried, full = with_recipe(recipe), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        record = recorded(tried)
        path = trial.trial_run(source, options, Path(folder), ignore_progress, "cpu", record)
        build_engine(path.parent, SPEC, ignore_progress, 1, record)
        record = recorded(full)
        path = Path(folder) / "full" / "full.safetensors"
        quantize_checkpoint(
            source,
            path,
            trial._samples(FULL),
            options,
            path.parent / "statistics",
            ignore_progress,
            record=record,
        )
        export_blocks(path, ignore_progress, record)
        build_engine(path.parent, SPEC, ignore_progress, 1, record)
    return tried, full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    source = RandomSource(FULL)
    ratios: dict[tuple[str, str], list[float]] = {}
    inside: dict[tuple[str, str], list[bool]] = {}
    for _ in range(arguments.rounds):
        for recipe in arguments.recipes:
            tried, full = round_of(source, recipe)
            for work, runs in full.items():
                units, seconds = runs[0]
                if work.startswith("build"):
                    block = f"{work.split()[1].rstrip(',')}_blocks.0"
                    said = estimate_plan(tried[work], block, units)
                else:
                    said = estimate(tried[work], units)
                assert said is not None
                row = (recipe, work.split(", nvfp4")[0].split(", cpu")[0])
                # the middle of a range is its geometric mean
                ratios.setdefault(row, []).append(seconds / (said.low * said.high) ** 0.5)
                inside.setdefault(row, []).append(said.low <= seconds <= said.high)
                print(f"{recipe}: {work}: {seconds:.2f} s, {said.low:.2f} to {said.high:.2f} said")
    print("| recipe | work | measured / estimated | inside of the range |\n|---|---|---|---|")
    for (recipe, work), found in ratios.items():
        hits = inside[recipe, work]
        listed = ", ".join(f"{ratio:.2f}" for ratio in sorted(found))
        print(
            f"| {recipe} | {work} | {median(found):.2f} ({listed}) | {sum(hits)} of {len(hits)} |"
        )


if __name__ == "__main__":
    main()
