"""One plan per block, or several blocks in a row in one plan? Measured without a GPU.

    python benchmarks/chains.py FOLDER                two and four blocks, FLUX.1-dev's width
    python benchmarks/chains.py FOLDER --width 256    the same counts, in seconds

Writes the weights of four blocks of each kind into FOLDER first, once: 0.8 GB at full width.
Inlines blocks behind each other into one ONNX file, builds it, and prints a Markdown table: per
block of the chain kernels, plan size and seconds; of the whole chain activation memory at the
profile's largest shape, and the peak of anonymous memory, which the system cannot take back. Every
build is a process of its own; three rounds in turns, medians of seconds and memory. The lint, which
knows one block at a time, is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import full_size  # first: it registers the package
import onnx_ir as ir
from flux_fp4.quant.flux.config import FluxConfig
from flux_fp4.quant.onnx_export.blocks import block_model
from flux_fp4.quant.onnx_export.contract import DOUBLE_MODULATION, SINGLE_MODULATION
from flux_fp4.quant.onnx_export.export import write_checked
from flux_fp4.quant.onnx_export.graph import BlockGraph
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.trt_runtime.build_log import activation_bytes, layers_from_log
from flux_fp4.trt_runtime.kernel_counts import kernel_counts
from flux_fp4.trt_runtime.plan import BuildJob, PlanFactory
from flux_fp4.trt_runtime.spec import ShapeProfile
from full_size_blocks import CONFIG, write_checkpoint

HEAD_DIM = 128
LENGTHS, ROUNDS = (1, 2, 4), 3
KINDS = {
    "double": (DOUBLE_MODULATION, {"img": "N", "txt": "T"}),
    "single": (SINGLE_MODULATION, {"x": "S"}),
}
"""Modulation inputs of a block, and the axes of the streams that go from block to block."""

Bounds = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def chain(checkpoint: QuantizedCheckpoint, kind: str, length: int) -> tuple[ir.Model, Bounds]:
    """Return blocks inlined behind each other, and the profile of their inputs."""
    graph, config = BlockGraph(checkpoint, None), checkpoint.metadata.config
    profile, bounds = ShapeProfile(), Bounds()

    def add(name: str, shape: tuple[int | str, ...], dtype: ir.DataType) -> ir.Value:
        sizes = [(d, d, d) if isinstance(d, int) else profile.bounds(d) for d in shape]
        low, middle, high = zip(*sizes, strict=True)
        bounds[name] = low, middle, high
        return graph.input(name, shape, dtype)

    high, dim = graph.high_precision, config.hidden_size
    rotary = {
        name: add(name, ("B", "S", config.head_dim // 2), ir.DataType.FLOAT)
        for name in ("cos", "sin")
    }
    modulation, axes = KINDS[kind]
    streams = {name: add(name, ("B", axis, dim), high) for name, axis in axes.items()}
    for index in range(length):
        block = f"{kind}_blocks.{index}"
        vectors = {name: add(f"{block}.{name}", ("B", 1, dim), high) for name in modulation}
        model = block_model(checkpoint, block)
        outputs = graph.inline(model.graph, {**streams, **rotary, **vectors})
        streams = {name: outputs[f"{name}_out"] for name in streams}
    outputs = {f"{name}_out": value for name, value in streams.items()}
    return graph.model(outputs, {}), bounds


def weights(folder: Path, width: int) -> Path:
    """Return a checkpoint with as many blocks as the longest chain; it is written once."""
    path = folder / f"{width}" / "chain.safetensors"
    size = {"hidden_size": width, "num_heads": width // HEAD_DIM}
    depth = {"depth": max(LENGTHS), "depth_single_blocks": max(LENGTHS)}
    config: FluxConfig = CONFIG.model_copy(update={**size, **depth})
    if not path.is_file():
        write_checkpoint(path, "nvfp4", config)
    return path


def build(path: Path, kind: str, length: int) -> dict[str, float]:
    """Build one chain and return what was measured."""
    onnx = path.with_name(f"{kind}-{length}.onnx")
    model, bounds = chain(QuantizedCheckpoint.read(path), kind, length)
    write_checked(model, onnx)
    job = BuildJob(
        block=onnx.stem,
        backend="tensorrt_rtx",
        onnx=str(onnx),
        plan="",
        targets=("sm120",),
        profile=bounds,
        fp4_linears=(),
        fp8_linears=(),
        fp8_attention=True,
    )
    factory = PlanFactory(job.backend, lambda message: None)
    started = time.monotonic()
    with full_size.MemoryMeter() as meter:
        size = memoryview(factory._serialized(job)).cast("B").nbytes
    seconds = time.monotonic() - started
    kernels = sum(kernel_counts(layers_from_log(factory.messages)).values())
    return {
        "kernels": kernels / length,
        "MB": size / 1e6 / length,
        "build, s": seconds / length,
        "activations, MB": activation_bytes(factory.messages) / 1e6,
        "peak anonymous, GB": meter.peak_anonymous / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=CONFIG.hidden_size)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = weights(options.folder, options.width)
    if options.one:
        kind, length = options.one
        print(json.dumps(build(path, kind, int(length))))
        return
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        for kind, length in itertools.product(KINDS, LENGTHS):
            command = [*sys.orig_argv, "--one", kind, str(length)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found.setdefault((kind, length), []).append(json.loads(output))
    names = [*next(iter(found.values()))[0]]
    print(f"| block | in one plan | {' | '.join(names)} |")
    print("|---" * (2 + len(names)) + "|")
    for (kind, length), rounds in found.items():
        medians = (statistics.median(each[name] for each in rounds) for name in names)
        print(f"| {kind} | {length} | {' | '.join(f'{value:.4g}' for value in medians)} |")


if __name__ == "__main__":
    main()
