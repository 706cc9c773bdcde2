"""What a LoRA or a mask beside an engine costs, on one block of each kind at FLUX.1-dev's size.

    python benchmarks/lora_cost.py FOLDER    writes 1.5 GB of random weights there first

Build time, kernels by the builder's log and plan bytes of the plain plan and its variants; FLOPs
from shapes; seconds on the reference backend at 512 tokens, plain and with every Linear adapted,
in turns so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from pack_import import register_pack  # noqa: E402

register_pack()

from flux_fp4.trt_runtime.adapters import LowRank, factor_shapes  # noqa: E402
from flux_fp4.trt_runtime.build_log import layers_from_log  # noqa: E402
from flux_fp4.trt_runtime.contract import variant_name  # noqa: E402
from flux_fp4.trt_runtime.kernel_counts import kernel_counts  # noqa: E402
from flux_fp4.trt_runtime.plan import PlanFactory  # noqa: E402
from flux_fp4.trt_runtime.plan_build import block_job  # noqa: E402
from flux_fp4.trt_runtime.reference import ReferenceExecutor  # noqa: E402
from flux_fp4.trt_runtime.selection import Selection  # noqa: E402
from flux_fp4.trt_runtime.signature import read_signature  # noqa: E402
from flux_fp4.trt_runtime.spec import BuildSpec  # noqa: E402
from full_size_blocks import CONFIG, exported_folder  # noqa: E402

RANKS = (16, 64, 128)
IMG_TOKENS, TXT_TOKENS, ROUNDS = 448, 64, 3
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build(path: Path, factory: PlanFactory) -> str:
    """Build one ONNX file and return a table row."""
    signature = read_signature(path)
    started = time.monotonic()
    job = block_job(signature, path.with_suffix(".plan"), factory.backend, BuildSpec())
    plan = factory.build(job)
    seconds = time.monotonic() - started
    kernels = sum(kernel_counts(layers_from_log(factory.messages)).values())
    activations = plan.activation_bytes / 1e6
    size = plan.bytes / 1e6
    name = signature.block
    return f"| {name} | {seconds:.1f} | {kernels} | {size:.1f} | {activations:.0f} |"


def inputs_of(path: Path) -> dict[str, torch.Tensor]:
    sizes = {"B": 1, "N": IMG_TOKENS, "T": TXT_TOKENS, "S": IMG_TOKENS + TXT_TOKENS}
    generator = torch.Generator().manual_seed(0)
    return {
        spec.name: torch.randn(
            [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape],
            generator=generator,
        )
        for spec in read_signature(path).inputs
    }


def adapters(path: Path, rank: int) -> dict[str, LowRank]:
    shapes = factor_shapes(read_signature(path).inputs)
    return {
        linear: LowRank(torch.full((width, rank), 1e-3), torch.full((rank, outputs), 1e-3))
        for linear, (width, outputs) in shapes.items()
    }


def reference_seconds(folder: Path, block: str) -> dict[int, float]:
    """Return the median seconds of a block by rank; 0 is the plain block."""
    executor = ReferenceExecutor(folder)
    executor.load(torch.device("cpu"))
    inputs, variant = (
        inputs_of(folder / f"{block}.onnx"),
        folder / f"{variant_name(block, lora=True)}.onnx",
    )
    found: dict[int, list[float]] = {}
    for turn in range(ROUNDS + 1):
        for rank in (0, *RANKS):
            executor.use(Selection({block: adapters(variant, rank)} if rank else {}))
            started = time.monotonic()
            executor.run(block, inputs)
            if turn:  # the first one warms up
                found.setdefault(rank, []).append(time.monotonic() - started)
    return {rank: statistics.median(seconds) for rank, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = exported_folder(parser.parse_args().folder)
    factory = PlanFactory("tensorrt_rtx", lambda message: None)
    print("| plan | build, s | kernels | MB | activations, MB |\n|---|---|---|---|---|")
    for block in CONFIG.block_names:
        for lora in (False, True):
            for mask in (False, True):
                path = folder / f"{variant_name(block, lora, mask)}.onnx"
                print(build(path, factory), flush=True)
    print("| block | rank | FLOPs beside the Linears' | reference, x plain |\n|---|---|---|---|")
    for block in CONFIG.block_names:
        shapes = factor_shapes(
            read_signature(folder / f"{variant_name(block, lora=True)}.onnx").inputs
        )
        products = sum(width * outputs for width, outputs in shapes.values())
        sums = sum(width + outputs for width, outputs in shapes.values())
        seconds = reference_seconds(folder, block)
        for rank in RANKS:
            flops, ratio = 100 * rank * sums / products, seconds[rank] / seconds[0]
            print(f"| {block} | {rank} | {flops:.1f} % | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
