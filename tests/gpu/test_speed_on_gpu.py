"""Matrix products of this machine's GPU against the peaks that bounds are reckoned from.

make gpu
"""

from __future__ import annotations

import pytest
import torch
from flux_fp4.quant.errors.speed import UnknownGpuError
from flux_fp4.quant.roofline.gpus import GpuPeaks, gpu_peaks
from flux_fp4.trt_runtime.backend import probe_gpu
from flux_fp4.trt_runtime.gemm_benchmark import Gemm, GemmTiming, measure_gemms
from tiny_flux import ignore_progress

WIDE = Gemm("single linear1", 4608, 3072, 21504)
"""Of FLUX.1-dev at one megapixel: large enough for the tensor cores' full speed."""

FASTER_CLOCK = 1.3
"""Clocks of real GPUs are above the data sheet's boost clock, by up to a fifth as far as known."""


@pytest.fixture(scope="module")
def timing() -> GemmTiming:
    gpu = probe_gpu()
    if gpu.problem:
        pytest.fail(f"These tests need an NVIDIA GPU: {gpu.problem}")
    device = torch.device("cuda", torch.cuda.current_device())
    return measure_gemms([WIDE], device, warm_up=5, repetitions=30, progress=ignore_progress)[0]


def test_formats_of_the_generation_are_measured(timing: GemmTiming) -> None:
    sm = probe_gpu().sm
    assert "bf16" in timing.seconds
    assert ("fp8" in timing.seconds) == (int(sm.removeprefix("sm")) >= 89), timing.missing
    assert ("nvfp4" in timing.seconds) == sm.startswith(("sm10", "sm12")), timing.missing


def test_products_are_below_the_peaks_and_not_far(timing: GemmTiming) -> None:
    try:
        peaks: GpuPeaks = gpu_peaks(torch.cuda.get_device_name())
    except UnknownGpuError as error:
        pytest.fail(f"Add this GPU to the data file. {error}")
    for unit in timing.seconds:
        reached = 1e12 * timing.tflops(unit) / peaks.operations[unit]  # type: ignore[index]
        assert 0.3 < reached < FASTER_CLOCK, f"{unit}: {reached:.0%} of the peak"
