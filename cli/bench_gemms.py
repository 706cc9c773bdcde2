"""`bench --gemms`: what the tensor cores reach in the Linears of a model, format by format."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .explain import published_name

if TYPE_CHECKING:
    import torch

    from ..quant.roofline.gpus import GpuPeaks
    from ..quant.roofline.work import StepSizes
    from ..trt_runtime.gemm_benchmark import Gemm, GemmTiming

FORMATS = ("bf16", "fp8", "nvfp4")


def measure(chosen: argparse.Namespace, sizes: StepSizes) -> int:
    """Measure and print."""
    import torch

    from ..trt_runtime.gemm_benchmark import measure_gemms
    from .progress import CommandProgress
    from .tables import print_table

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gemms = model_gemms(chosen.model, sizes)
    with CommandProgress() as progress:
        timings = measure_gemms(gemms, device, chosen.warm_up, chosen.repetitions, progress)
    peaks = _peaks(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{chosen.model}: Linears of a block of each kind on {name}, torch {torch.__version__}")
    header = ("Linear", "tokens x in x out", *FORMATS, "nvfp4 / fp8", "nvfp4 / bf16")
    print_table(header, [_row(timing, peaks) for timing in timings])
    for format_ in FORMATS:
        reasons = {timing.missing[format_] for timing in timings if format_ in timing.missing}
        for reason in sorted(reasons):
            print(f"{format_} is not measured: {reason}")
    if chosen.json is not None:
        from ..trt_runtime.store import write_atomic

        figures = {"device": name, "torch": torch.__version__, "gemms": list(map(asdict, timings))}
        write_atomic(chosen.json, json.dumps(figures, indent=1).encode())
    return 0


def model_gemms(model: str, sizes: StepSizes) -> list[Gemm]:
    """Return the products of a block of each kind.

    Raises:
        OptionError: There is no such model.
    """
    from ..quant.flux.config import block_linears, plan_shapes
    from ..quant.roofline.published import PUBLISHED
    from ..trt_runtime.gemm_benchmark import Gemm

    config = PUBLISHED[published_name(model)]
    tokens = {"img": sizes.img_tokens, "txt": sizes.txt_tokens}
    both = sizes.img_tokens + sizes.txt_tokens
    return [
        Gemm(
            f"{block.partition('_')[0]} {linear}",
            sizes.batch * tokens.get(linear[:3], both),
            *plan_shapes(config, block)[f"{linear}.weight"][::-1],
        )
        for block in ("double_blocks.0", "single_blocks.0")
        for linear in block_linears(block)
    ]


def _peaks(device: torch.device) -> GpuPeaks | None:
    from ..quant.errors.speed import UnknownGpuError
    from ..quant.roofline.gpus import device_peaks

    if device.type != "cuda":
        return None
    try:
        return device_peaks(device)
    except UnknownGpuError as error:
        print(f"Parts of peaks are not shown. {error}")
        return None


def _row(timing: GemmTiming, peaks: GpuPeaks | None) -> tuple[str, ...]:
    gemm = timing.gemm
    size = f"{gemm.tokens} x {gemm.inputs} x {gemm.outputs}"
    cells = [_cell(timing, format_, peaks) for format_ in FORMATS]
    ratios = [_ratio(timing, format_) for format_ in ("fp8", "bf16")]
    return (gemm.name, size, *cells, *ratios)


def _cell(timing: GemmTiming, format_: Any, peaks: GpuPeaks | None) -> str:
    if format_ not in timing.seconds:
        return ""
    speed = timing.tflops(format_)
    cell = f"{1000 * timing.seconds[format_].median:.3f} ms, {speed:.1f} TFLOPS"
    if peaks is None or format_ not in peaks.operations:
        return cell
    return f"{cell}, {1e12 * speed / peaks.operations[format_]:.0%} of the peak"


def _ratio(timing: GemmTiming, other: str) -> str:
    if "nvfp4" not in timing.seconds or other not in timing.seconds:
        return ""
    return f"{timing.seconds[other].median / timing.seconds['nvfp4'].median:.2f}"
