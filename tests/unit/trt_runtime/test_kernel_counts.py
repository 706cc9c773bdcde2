"""Which kind a row of the builder's layer list is; tests/unit/test_kernels.py counts real plans."""

from __future__ import annotations

import pytest
from flux_fp4.trt_runtime.build_log import BuiltLayer
from flux_fp4.trt_runtime.kernel_counts import KERNEL_KINDS, kernel_counts, kernel_kind

BF16 = ("BFloat16",)
FP4_OPERANDS = ("FP4E2M1", "FP8")


def layer(
    name: str,
    kind: str = "kgen",
    inputs: tuple[str, ...] = BF16,
    outputs: tuple[str, ...] = BF16,
    nodes: tuple[str, ...] = (),
    constants: tuple[str, ...] = (),
) -> BuiltLayer:
    return BuiltLayer(name, kind, inputs, constants, nodes, outputs)


MATMUL = ("linear1/MatMul",)
ROWS = [
    ("FP4 GEMM", layer("g", "gemm", FP4_OPERANDS, nodes=MATMUL, constants=FP4_OPERANDS)),
    ("FP8 GEMM", layer("g", "gemm", ("FP8",), nodes=MATMUL, constants=("FP8", "Float"))),
    ("other GEMM", layer("g", "gemm", BF16, constants=BF16)),
    ("other GEMM", layer("__myl_FcAddAdd_myl0_8", "runtime_fusion", BF16 * 3)),
    ("attention", layer("_gemm_mha_v2_myl0_10", inputs=("FP8",) * 3, nodes=("attention/QK",))),
    ("quantize", layer("__myl_Dyna_myl0_4", outputs=FP4_OPERANDS, nodes=("linear1/Quantize",))),
    ("quantize", layer("__myl_DynaReshReshMove_myl0_4", outputs=FP4_OPERANDS, nodes=MATMUL)),
    (
        "swizzle",
        layer("__myl_ReplConcReshReshMove_myl0_5", "kgen", ("FP8", "Int64"), ("FP8",), MATMUL),
    ),
    ("norm", layer("__myl_CastMeanSubMulMean_myl0_2", nodes=("LayerNormalization_0",))),
    ("norm", layer("__myl_ReshCastMulMean_myl0_6", nodes=("ReduceMean_37", "linear1/Bias"))),
    ("elementwise", layer("__myl_ReshAddMulAddCast_myl0_36", nodes=("linear2/Bias",))),
    ("elementwise", layer("__myl_TranReshEtc_myl0_36", nodes=("Transpose_1",))),
    ("copy", layer("__myl_TranReshSlicReshSlicResh_myl0_23", nodes=("Transpose_77",))),
    ("copy", layer("__myl_ReshMove_myl0_3", "kgen", ("FP8",), ("FP8",), ("Reshape_3",))),
]


@pytest.mark.parametrize(("expected", "row"), ROWS, ids=[row.name for _, row in ROWS])
def test_kind_of_a_row(expected: str, row: BuiltLayer) -> None:
    assert kernel_kind(row) == expected


@pytest.mark.parametrize("kind", ["signal", "wait", "shape_call"])
def test_what_launches_nothing_is_no_kernel(kind: str) -> None:
    assert kernel_kind(layer("__mye17761_myl0_7", kind, (), ())) == ""


def test_counts_name_every_kind_in_order() -> None:
    counts = kernel_counts([row for _, row in ROWS] + [layer("s", "signal")])
    assert tuple(counts) == KERNEL_KINDS
    assert sum(counts.values()) == len(ROWS)
    assert (counts["quantize"], counts["swizzle"], counts["copy"]) == (2, 1, 2)
