"""Kernels of exported and built blocks: no change may add one unnoticed.

Counts come from the builder's log and not from time, so they are the same on every machine. They
are of blocks of width 256; benchmarks/kernels.py shows those of FLUX's width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.trt_runtime.build_log import layers_from_log
from flux_fp4.trt_runtime.contract import variant_name
from flux_fp4.trt_runtime.kernel_counts import (
    ATTENTION,
    COPY,
    ELEMENTWISE,
    FP4_GEMM,
    FP8_GEMM,
    NORM,
    OTHER_GEMM,
    QUANTIZE,
    kernel_counts,
)
from flux_fp4.trt_runtime.plan import PlanFactory
from flux_fp4.trt_runtime.plan_build import block_job
from flux_fp4.trt_runtime.signature import read_signature
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile
from full_size_blocks import write_checkpoint
from tiny_flux import TINY, TINY_FLUX2, ignore_progress

DOUBLE, SINGLE = "double_blocks.0", "single_blocks.0"
ONE_BLOCK = {"depth": 1, "depth_single_blocks": 1}
CONFIGS = {
    "FLUX.1": TINY.model_copy(update=ONE_BLOCK),
    "FLUX.2": TINY_FLUX2.model_copy(update=ONE_BLOCK),
}

NVFP4_DOUBLE = {FP4_GEMM: 8, ATTENTION: 1, QUANTIZE: 8, NORM: 5, ELEMENTWISE: 5, COPY: 1}
NVFP4_SINGLE = {FP4_GEMM: 2, ATTENTION: 1, QUANTIZE: 2, NORM: 2, ELEMENTWISE: 3}
LORA_DOUBLE = NVFP4_DOUBLE | {OTHER_GEMM: 16, ELEMENTWISE: 4, COPY: 5}
LORA_SINGLE = NVFP4_SINGLE | {OTHER_GEMM: 4, ELEMENTWISE: 4}

ALLOWED = [
    ("nvfp4", True, "", "FLUX.1", NVFP4_DOUBLE, NVFP4_SINGLE),
    ("nvfp4", False, "", "FLUX.1", NVFP4_DOUBLE, NVFP4_SINGLE),
    (
        # without a bias v is quantized by itself, not where q, k and v are split
        "nvfp4", True, "", "FLUX.2",
        NVFP4_DOUBLE | {ELEMENTWISE: 6}, NVFP4_SINGLE | {ELEMENTWISE: 4},
    ),
    ("nvfp4", True, "mask", "FLUX.1", NVFP4_DOUBLE, NVFP4_SINGLE),
    ("nvfp4", True, "lora", "FLUX.1", LORA_DOUBLE, LORA_SINGLE),
    ("nvfp4", True, "lora mask", "FLUX.1", LORA_DOUBLE, LORA_SINGLE),
    (
        # what brings attention's output to the streams smooths it in passing: no copy any more
        "nvfp4-awq", True, "", "FLUX.1",
        NVFP4_DOUBLE | {ELEMENTWISE: 6, COPY: 0}, NVFP4_SINGLE,
    ),
    (
        "nvfp4-svdquant", True, "", "FLUX.1",
        NVFP4_DOUBLE | {OTHER_GEMM: 16, COPY: 4}, NVFP4_SINGLE | {OTHER_GEMM: 4, ELEMENTWISE: 4},
    ),
    (
        "fp8", True, "", "FLUX.1",
        {FP8_GEMM: 8, ATTENTION: 1, NORM: 5, ELEMENTWISE: 5, COPY: 1},
        {FP8_GEMM: 2, ATTENTION: 1, NORM: 2, ELEMENTWISE: 3},
    ),
    (
        "bf16", False, "", "FLUX.1",
        {OTHER_GEMM: 8, ATTENTION: 1, NORM: 5, ELEMENTWISE: 1, COPY: 1},
        {OTHER_GEMM: 2, ATTENTION: 1, NORM: 2, ELEMENTWISE: 2},
    ),
]  # fmt: skip
"""Format of the Linears, FP8 attention, form of the block, model, and kernels of either block."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool, str], Path]:
    """Folders with one block of each kind from random weights; each is written once."""
    folders: dict[tuple[str, bool, str], Path] = {}

    def export(linears: str, fp8_attention: bool, model: str) -> Path:
        key = linears, fp8_attention, model
        if key not in folders:
            path = tmp_path_factory.mktemp("model") / "blocks.safetensors"
            write_checkpoint(path, linears, CONFIGS[model], fp8_attention)
            export_blocks(path, ignore_progress)
            folders[key] = path.parent
        return folders[key]

    return export


@pytest.fixture(scope="module")
def factory() -> PlanFactory:
    return PlanFactory("tensorrt_rtx", lambda message: None)


def counted(path: Path, factory: PlanFactory, profile: ShapeProfile) -> dict[str, int]:
    """Build one ONNX file; return its kernels by kind, without kinds that it has none of."""
    job = block_job(
        read_signature(path), path.with_suffix(".plan"), factory.backend, BuildSpec(profile=profile)
    )
    factory.build(job)
    counts = kernel_counts(layers_from_log(factory.messages))
    return {kind: count for kind, count in counts.items() if count}


@pytest.mark.parametrize(
    ("linears", "fp8_attention", "form", "model", "double", "single"),
    ALLOWED,
    ids=[f"{row[0]}-{'fp8' if row[1] else 'bf16'}-{row[2] or 'plain'}-{row[3]}" for row in ALLOWED],
)
def test_no_kernel_is_added(
    exported: Callable[[str, bool, str], Path],
    factory: PlanFactory,
    linears: str,
    fp8_attention: bool,
    form: str,
    model: str,
    double: dict[str, int],
    single: dict[str, int],
) -> None:
    folder = exported(linears, fp8_attention, model)
    for block, allowed in ((DOUBLE, double), (SINGLE, single)):
        name = variant_name(block, "lora" in form, "mask" in form)
        found = counted(folder / f"{name}.onnx", factory, ShapeProfile())
        more = {kind: n for kind, n in found.items() if n > allowed.get(kind, 0)}
        assert not more, f"{name} has more of {more} than {allowed}; all it has: {found}"


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(ShapeProfile(max_batch=4), id="batch"),
        pytest.param(
            ShapeProfile(opt_img_tokens=1024, max_img_tokens=16_384, max_txt_tokens=1024),
            id="large pictures",
        ),
        pytest.param(ShapeProfile(1, 33, 100, 120, 1, 20, 77), id="fewer tokens than one tile"),
    ],
)
def test_no_profile_adds_a_kernel(
    exported: Callable[[str, bool, str], Path], factory: PlanFactory, profile: ShapeProfile
) -> None:
    folder = exported("nvfp4", True, "FLUX.1")
    for block, allowed in ((DOUBLE, NVFP4_DOUBLE), (SINGLE, NVFP4_SINGLE)):
        found = counted(folder / f"{block}.onnx", factory, profile)
        assert sum(found.values()) <= sum(allowed.values()), f"{block}: {found}"
