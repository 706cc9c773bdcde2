"""Matrix products in turns: what runs here is measured, and what does not says why."""

from __future__ import annotations

import sys

import pytest
import torch
from flux_fp4.trt_runtime import gemm_benchmark
from flux_fp4.trt_runtime.benchmark import Spread
from flux_fp4.trt_runtime.gemm_benchmark import Gemm, GemmTiming, measure_gemms

CPU = torch.device("cpu")
SMALL = Gemm("small", 32, 64, 48)


def measured(gemms: list[Gemm], repetitions: int = 3) -> tuple[list[GemmTiming], list[str]]:
    phases: list[str] = []
    timings = measure_gemms(
        gemms, CPU, 1, repetitions, lambda phase, _done, _total: phases.append(phase)
    )
    return timings, phases


def test_formats_of_this_machine_are_measured() -> None:
    (timing,), phases = measured([SMALL])
    assert phases == ["Multiplying small"]
    assert timing.seconds["bf16"].median > 0
    assert timing.tflops("bf16") == 2 * 32 * 64 * 48 / timing.seconds["bf16"].median / 1e12
    # there are no NVFP4 products for CPUs
    assert "nvfp4" not in timing.seconds
    assert timing.missing["nvfp4"]


def test_products_are_those_of_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 64, generator=generator).bfloat16()
    weight = torch.randn(48, 64, generator=generator).bfloat16()
    expected = x.float() @ weight.float().t()
    bf16, fp8 = (prepare(x, weight)() for prepare in (gemm_benchmark._bf16, gemm_benchmark._fp8))
    for product, limit in ((bf16, 0.01), (fp8, 0.06)):
        assert isinstance(product, torch.Tensor)
        error = (product.float() - expected).norm() / expected.norm()
        assert error < limit, f"{error:.3f}"


def test_formats_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("bf16", "fp8", "nvfp4"):
        monkeypatch.setattr(
            gemm_benchmark, f"_{name}", lambda _x, _w, name=name: lambda: calls.append(name)
        )
    (timing,), _ = measured([SMALL], repetitions=2)
    assert calls == ["bf16", "fp8", "nvfp4"] * 3  # the first of each warms up
    assert timing.missing == {}
    assert isinstance(timing.seconds["nvfp4"], Spread)


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    (timing,), _ = measured([SMALL])
    assert "comfy_kitchen" in timing.missing["nvfp4"]


def test_running_out_of_memory_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_x: torch.Tensor, _weight: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(gemm_benchmark, "_fp8", full)
    with pytest.raises(torch.OutOfMemoryError):
        measured([SMALL])
