"""Velocity SQNR of the trained small model on held-out pictures, by recipe and activation range.

    python benchmarks/small_model.py range       percentile and headroom, by number of pictures;
                                                 only the percentiles named behind it, if any
    python benchmarks/small_model.py recipes     every recipe, or those named behind it
    python benchmarks/small_model.py linears     the same, output SQNR of the Linears instead

The quantized model is emulated in torch. Each number is the mean over calibrations with different
pictures and noise, with the standard deviation behind it; held-out pictures are the same for all.
``--repeats`` sets how many calibrations, ``--held-out`` the first of 64 held-out pictures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from pack_import import register_pack  # noqa: E402

register_pack()

import small_model_files  # noqa: E402
from comfy_in_process import import_comfyui  # noqa: E402

import_comfyui()

from flux_fp4.quant.calibration import CalibrationSet  # noqa: E402
from flux_fp4.quant.emulation import emulated_block  # noqa: E402
from flux_fp4.quant.flux.model import LastLayer  # noqa: E402
from flux_fp4.quant.quantize import quantize_checkpoint  # noqa: E402
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint  # noqa: E402
from flux_fp4.quant.recipe import RECIPES, QuantizeOptions, named_recipe  # noqa: E402
from flux_fp4.quant.sources.source import FluxSource, open_source  # noqa: E402
from flux_fp4.quant.sqnr import SQNR  # noqa: E402
from flux_fp4.quant.stack import block_with_weights, embed, run_block  # noqa: E402
from small_model.samples import Digits  # noqa: E402

HELD_OUT = 1664
"""First of 64 pictures that are not calibrated with. Smoothing's margin and the activation range
were chosen on the 64 before them."""

REPEATS = 4


@dataclass(frozen=True)
class Bench:
    """The model in full precision with what it predicts of the held-out pictures."""

    source: FluxSource
    digits: Digits
    held_out: CalibrationSet
    velocities: list[Tensor]
    folder: Path
    repeats: int

    @classmethod
    def prepare(cls, folder: Path, repeats: int, first: int) -> Bench:
        """Predict the held-out velocities; results go to ``folder``."""
        source = open_source(small_model_files.DATA / small_model_files.DIFFUSION_MODEL)
        digits = Digits.load()
        held_out = digits.samples(range(first, first + 64), seed=99)
        velocities = list(_velocities(source, held_out, None))
        return cls(source, digits, held_out, velocities, folder, repeats)

    def measured(self, options: QuantizeOptions, pictures: int) -> str:
        """Return mean and deviation of the velocity SQNR over calibrations."""
        found = []
        for repeat in range(self.repeats):
            chosen = range(pictures * repeat, pictures * (repeat + 1))
            calibration = self.digits.samples(chosen, seed=repeat)
            path = self.folder / "model" / "model.safetensors"
            quantized = quantize_checkpoint(
                self.source,
                path,
                calibration,
                options,
                self.folder / "statistics",
                lambda phase, done, total: None,
                dtype=torch.float32,
            )
            ratio = SQNR()
            actual = _velocities(self.source, self.held_out, quantized)
            for expected, velocity in zip(self.velocities, actual, strict=True):
                ratio.add(expected, velocity)
            found.append(ratio.db)
        return f"{statistics.fmean(found):.2f} ± {statistics.stdev(found):.2f}"


@torch.inference_mode()
def _velocities(
    source: FluxSource, samples: CalibrationSet, quantized: QuantizedCheckpoint | None
) -> Iterator[Tensor]:
    states = embed(source, samples, "cpu", torch.float32)
    for name in source.config.block_names:
        block = block_with_weights(name, source.config, source.submodule(name), torch.float32)
        if quantized is not None:
            block = emulated_block(block, quantized.block_tensors(name))
        states = [run_block(block, state) for state in states]
    layer = LastLayer(source.config)
    layer.load_state_dict(source.submodule("final_layer"))
    for sample, state in zip(samples.samples, states, strict=True):
        yield layer(state.img[:, sample.conditioning.context.shape[1] :], state.vec)


def activation_range(bench: Bench, percentiles: Sequence[float]) -> None:
    """Print how percentile and headroom do with few and with many pictures."""
    counts = (1, 4, 16)
    print(f"| percentile | headroom | {' | '.join(f'{n} pictures' for n in counts)} |")
    print("|---" * (2 + len(counts)) + "|")
    for percentile in percentiles:
        for headroom in (1.0, 1.25, 1.5, 2.0, 4.0):
            options = QuantizeOptions(percentile=percentile, headroom=headroom)
            cells = [bench.measured(options, count) for count in counts]
            print(f"| {percentile} | {headroom} | {' | '.join(cells)} |", flush=True)


def recipes(bench: Bench, names: Sequence[str]) -> None:
    """Print some recipes, calibrated with 16 pictures."""
    print("| recipe | FP8 attention | attention in high precision |")
    print("|---|---|---|")
    for name in names:
        cells = [
            bench.measured(QuantizeOptions(recipe=named_recipe(name), fp8_attention=fp8), 16)
            for fp8 in (True, False)
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def linears(names: Sequence[str]) -> None:
    """Print what reports say of some recipes' Linears, calibrated with 16 pictures."""
    source = open_source(small_model_files.DATA / small_model_files.DIFFUSION_MODEL)
    calibration = Digits.load().samples(range(16), seed=0)
    print("| recipe | mean, dB | worst, dB | formats | MB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder) / name / f"{name}.safetensors"
            options = QuantizeOptions(recipe=named_recipe(name))
            quantized = quantize_checkpoint(
                source,
                path,
                calibration,
                options,
                Path(folder) / "statistics",
                lambda phase, done, total: None,
                dtype=torch.float32,
            )
            reports = quantized.metadata.linears
            found = [report.output_sqnr_db for report in reports if report.format != "bf16"]
            quality = (
                f"{statistics.fmean(found):.1f} | {min(found):.1f}" if found else "exact | exact"
            )
            formats = Counter(report.format for report in reports)
            counts = ", ".join(f"{count} {kind}" for kind, count in formats.items())
            size = path.stat().st_size / 1e6
            print(f"| {name} | {quality} | {counts} | {size:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=["range", "recipes", "linears"])
    parser.add_argument("names", nargs="*", metavar="recipe or percentile")
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="calibrations, at least 2")
    arguments = parser.parse_args()
    names = arguments.names or list(RECIPES)
    if arguments.table == "linears":
        linears(names)
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.prepare(Path(folder), arguments.repeats, arguments.held_out)
        if arguments.table == "range":
            percentiles = [float(name) for name in arguments.names]
            activation_range(bench, percentiles or (99.0, 99.9, 100.0))
        else:
            recipes(bench, names)


if __name__ == "__main__":
    main()
