"""The lint's reading of the builder log; test_builder.py runs it on real builds."""

from __future__ import annotations

import pytest
from flux_fp4.trt_runtime.build_log import (
    BuiltLayer,
    activation_bytes,
    layers_from_log,
    lint_build,
)
from flux_fp4.trt_runtime.errors.build import EngineLintError


def operand(datatype: str) -> str:
    return (
        f"{{ Name: t, Dimensions: [-1,256], Strides: [256,1], Datatype: {datatype}, Format: (L) }}"
    )


def row(name: str, kind: str, inputs: list[str], constants: list[str], nodes: list[str]) -> str:
    """Return a row in the form of TensorRT-RTX 1.7."""
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {', '.join(map(operand, inputs))}], "
        f"Constants: [ {', '.join(map(operand, constants))}], "
        f"Outputs: [ {operand('BFloat16')}], TacticName: x, StreamId: 0, "
        f"Metadata: {''.join(f'[ONNX Layer: {node}]' for node in nodes)}"
    )


FP4_GEMM = row(
    "linear1/MatMul_myl0_5",
    "gemm",
    ["FP4E2M1", "FP8"],
    ["FP4E2M1", "Float", "FP8"],
    ["linear1/MatMul", "linear1/DQ_weight"],
)
BF16_GEMM = row("linear1/MatMul_myl0_5", "gemm", ["BFloat16", "BFloat16"], [], ["linear1/MatMul"])
MIXED_GEMM = row("g", "gemm", ["BFloat16"], ["FP4E2M1", "FP8"], ["linear1/MatMul"])
UNPACK = row("__myl_Cast_3", "kgen", [], ["FP4E2M1", "FP8"], ["linear1/DQ_weight", "x"])
FP8_GEMM = row(
    "linear1/MatMul_myl0_4", "gemm", ["FP8"], ["FP8", "Float", "Float"], ["linear1/MatMul"]
)
FP8_BY_BF16_GEMM = row(
    "__myl_CastMulFc_myl0_11", "runtime_fusion", ["FP8", "BFloat16"], [], ["linear1/MatMul"]
)
FP8_UNPACK = row("__myl_CastMulCast_9", "kgen", [], ["BFloat16", "FP8"], ["linear1/DQ_weight"])
MHA = row("_gemm_mha_v2_myl0_10", "kgen", ["FP8", "FP8", "FP8"], [], ["attention/QK"])
HIGH_MHA = row("_gemm_mha_v2_myl0_10", "kgen", ["BFloat16"] * 3, [], ["attention/QK"])


def layers(*rows: str) -> tuple[BuiltLayer, ...]:
    return layers_from_log(["VERBOSE noise", "Layers:\n" + "\n".join(rows) + "\nI/O Tensors:"])


def test_rows_are_read_with_operands_and_nodes() -> None:
    (layer,) = layers(FP4_GEMM)
    assert layer == BuiltLayer(
        "linear1/MatMul_myl0_5",
        "gemm",
        ("FP4E2M1", "FP8"),
        ("FP4E2M1", "Float", "FP8"),
        ("linear1/MatMul", "linear1/DQ_weight"),
        ("BFloat16",),
    )


def test_activation_memory_is_the_largest_reported() -> None:
    log = ["Total Activation Memory: 10 bytes", "x", "Total Activation Memory: 123 bytes"]
    assert activation_bytes(log) == 123


def test_expected_kernels_pass() -> None:
    second = FP8_GEMM.replace("linear1", "linear2")
    rows = layers(FP4_GEMM, second, MHA)
    counts = lint_build("b", rows, ["linear1"], ["linear2"], fp8_attention=True)
    assert (counts.fp4_gemms_expected, counts.fp4_gemms_found) == (1, 1)
    assert (counts.fp8_gemms_expected, counts.fp8_gemms_found) == (1, 1)
    assert (counts.fp8_mha_expected, counts.fp8_mha_found) == (1, 1)


def test_linears_merged_into_one_gemm_pass() -> None:
    merged = row("g", "gemm", ["FP4E2M1"], ["FP4E2M1"], ["q/MatMul", "k/MatMul"])
    assert lint_build("b", layers(merged), ["q", "k"], [], fp8_attention=False).fp4_gemms_found == 2


def test_linear_split_into_gemms_of_its_format_passes() -> None:
    counts = lint_build("b", layers(FP8_GEMM, FP8_GEMM), [], ["linear1"], fp8_attention=False)
    assert counts.fp8_gemms_found == 1


def test_high_precision_linears_may_become_any_gemm() -> None:
    counts = lint_build("b", layers(BF16_GEMM, HIGH_MHA), [], [], fp8_attention=False)
    assert (counts.fp4_gemms_found, counts.fp8_gemms_found, counts.fp8_mha_found) == (0, 0, 0)


@pytest.mark.parametrize(
    ("rows", "linears", "fp8", "named"),
    [
        pytest.param([BF16_GEMM], ["linear1"], False, "linear1", id="bf16 GEMM"),
        pytest.param([MIXED_GEMM], ["linear1"], False, "linear1", id="bf16 x FP4 GEMM"),
        pytest.param([BF16_GEMM, UNPACK], ["linear1"], False, "linear1", id="dequantized weight"),
        pytest.param([FP4_GEMM, UNPACK], ["linear1"], False, "linear1", id="FP4 and dequantized"),
        pytest.param([FP4_GEMM], ["linear1", "linear2"], False, "linear2", id="GEMM is gone"),
        pytest.param([FP4_GEMM], ["linear1"], True, "attention", id="no MHA"),
        pytest.param([FP4_GEMM, HIGH_MHA], ["linear1"], True, "attention", id="bf16 MHA"),
        pytest.param([FP4_GEMM, MHA], ["linear1"], False, "attention", id="MHA not asked for"),
        pytest.param([], ["linear1"], True, "log", id="no layer list"),
    ],
)
def test_lost_precision_is_named(
    rows: list[str], linears: list[str], fp8: bool, named: str
) -> None:
    with pytest.raises(EngineLintError) as caught:
        lint_build("single_blocks.7", layers(*rows), linears, [], fp8_attention=fp8)
    assert caught.value.linears == (named,)
    assert "single_blocks.7" in str(caught.value)
    assert "not stored" in str(caught.value)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([BF16_GEMM], id="bf16 GEMM"),
        pytest.param([FP8_BY_BF16_GEMM], id="FP8 x bf16 GEMM"),
        pytest.param([FP8_GEMM, FP8_BY_BF16_GEMM], id="one of two GEMMs"),
        pytest.param([FP8_GEMM, FP8_UNPACK], id="FP8 and dequantized"),
        pytest.param([FP4_GEMM], id="FP4 GEMM"),
        pytest.param([MHA], id="GEMM is gone"),
    ],
)
def test_lost_fp8_is_named(rows: list[str]) -> None:
    attention = MHA in rows
    with pytest.raises(EngineLintError) as caught:
        lint_build("double_blocks.3", layers(*rows), [], ["linear1"], fp8_attention=attention)
    assert caught.value.linears == ("linear1",)


def test_an_fp8_gemm_is_no_fp4_gemm() -> None:
    with pytest.raises(EngineLintError, match="FP8 x FP8 GEMM"):
        lint_build("b", layers(FP8_GEMM), ["linear1"], [], fp8_attention=False)


def test_a_name_inside_another_is_not_confused() -> None:
    other = FP4_GEMM.replace("linear1/", "xlinear1/")
    with pytest.raises(EngineLintError):
        lint_build("b", layers(other), ["linear1"], [], fp8_attention=False)
