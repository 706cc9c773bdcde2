"""Rewrites a block's ONNX so that ONNX Runtime computes on a CPU exactly what the FP4 graph means.

ONNX Runtime 1.32 has no FLOAT4E2M1 kernels and no bf16 MatMul on the CPU. Every E2M1 value is exact
in E4M3, so FP4 tensors travel as FP8; the quantizer of TensorRT's domain becomes a local function;
bf16 and fp16 become fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

E2M1_IN_E4M3 = (0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C)
"""E4M3 codes of 0, 0.5, 1, 1.5, 2, 3, 4, 6, in the order of the E2M1 codes 0 to 7."""

DYNAMIC_QUANTIZE_TEXT = """
<domain: "trt", opset_import: ["" : OPSET]>
TRT_FP4DynamicQuantize <axis, block_size, scale_type> (x, gscale) => (q, s) {
    half = Constant <value_float: float = 0.5> ()
    one = Constant <value_float: float = 1.0> ()
    two = Constant <value_float: float = 2.0> ()
    four = Constant <value_float: float = 4.0> ()
    six = Constant <value_float: float = 6.0> ()
    minus_six = Constant <value_float: float = -6.0> ()
    smallest = Constant <value_float: float = 1e-30> ()
    first = Constant <value_ints: ints = [0]> ()
    last = Constant <value_ints: ints = [-1]> ()
    block = Constant <value_ints: ints = [-1, 16]> ()

    shape = Shape (x)
    leading = Slice (shape, first, last)
    block_shape = Concat <axis: int = 0> (leading, block)
    blocks = Reshape (x, block_shape)

    magnitudes = Abs (blocks)
    amax = ReduceMax <keepdims: int = 0> (magnitudes, last)
    divisor = Mul (six, gscale)
    scale = Div (amax, divisor)
    s = Cast <to: int = 17> (scale)

    rounded_scale = Cast <to: int = 1> (s)
    step = Mul (rounded_scale, gscale)
    safe_step = Max (step, smallest)
    block_step = Unsqueeze (safe_step, last)
    scaled = Div (blocks, block_step)
    clipped = Clip (scaled, minus_six, six)

    magnitude = Abs (clipped)
    below_two = Less (magnitude, two)
    below_four = Less (magnitude, four)
    upper_grid = Where (below_four, one, two)
    grid = Where (below_two, half, upper_grid)
    in_steps = Div (clipped, grid)
    whole_steps = Round (in_steps)
    values = Mul (whole_steps, grid)
    reshaped = Reshape (values, shape)
    q = Cast <to: int = 17> (reshaped)
}
"""
"""The quantizer in ONNX's text form. Type 17 is FLOAT8E4M3FN, to which Cast saturates; 1 is FLOAT.
E2M1's grid has step 0.5 below 2, 1 below 4 and 2 up to 6; Round takes ties to even. Where a scale
rounds to 0 the divisor is 1e-30: whatever q is then, it is multiplied by 0."""


def reference_model(path: Path) -> onnx.ModelProto:
    """Load a checked block file with its weights and rewrite it for ONNX Runtime's CPU provider.

    The weights stay quantized, at one byte each.
    """
    import onnx

    model = onnx.load(path)
    for tensor in model.graph.initializer:
        _convert_initializer(tensor)
    for node in model.graph.node:
        _promote_attributes(node)
    del model.graph.value_info[:]
    _promote_values((*model.graph.input, *model.graph.output))
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    nodes = [part for node in model.graph.node for part in _without_quantize_linear(node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.functions[:]
    model.functions.append(dynamic_quantize_function(opset))
    return model


def fp8_from_packed_fp4(packed: bytes) -> bytes:
    """Return one E4M3 byte per E2M1 code; the first value of a pair is in the low nibble."""
    codes = np.array([*E2M1_IN_E4M3, *(0x80 | code for code in E2M1_IN_E4M3)], np.uint8)
    pairs = np.arange(256)
    table = np.stack([codes[pairs & 15], codes[pairs >> 4]], axis=1)
    return table[np.frombuffer(packed, np.uint8)].tobytes()


def dynamic_quantize_function(opset: int) -> onnx.FunctionProto:
    """Return TRT_FP4DynamicQuantize(x, gscale) -> (q, s) as a function of standard operators.

    NVFP4: per block of 16, s = E4M3(amax / (6 gscale)), rounded to nearest even and saturated at
    448; then q = E2M1(x / (s gscale)) with ties to even.
    """
    from onnx import parser

    return parser.parse_function(DYNAMIC_QUANTIZE_TEXT.replace("OPSET", str(opset)))


def _convert_initializer(tensor: onnx.TensorProto) -> None:
    from onnx import TensorProto, numpy_helper

    if tensor.data_type == TensorProto.FLOAT4E2M1:
        tensor.raw_data = fp8_from_packed_fp4(tensor.raw_data)
        tensor.data_type = TensorProto.FLOAT8E4M3FN
    elif tensor.data_type in (TensorProto.BFLOAT16, TensorProto.FLOAT16):
        promoted = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(promoted, tensor.name))


def _without_quantize_linear(node: onnx.NodeProto) -> tuple[onnx.NodeProto, ...]:
    """Write QuantizeLinear to E4M3 as what it means.

    ONNX Runtime 1.23, the last for Python 3.10, has no CPU kernel of opset 23's QuantizeLinear.
    """
    from onnx import TensorProto, helper

    if node.op_type != "QuantizeLinear":
        return (node,)
    x, scale, _ = node.input
    (quantized,) = node.output
    scaled = f"{quantized}/scaled"
    return (
        helper.make_node("Div", [x, scale], [scaled], name=f"{node.name}/Div"),
        helper.make_node(
            "Cast", [scaled], [quantized], name=node.name, to=TensorProto.FLOAT8E4M3FN
        ),
    )


def _promote_attributes(node: onnx.NodeProto) -> None:
    """Turn casts to bf16 or fp16 into casts to fp32; the other attributes hold no such type."""
    from onnx import TensorProto

    if node.op_type != "Cast":
        return
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i in (TensorProto.BFLOAT16, TensorProto.FLOAT16):
            attribute.i = TensorProto.FLOAT


def _promote_values(values: Iterable[onnx.ValueInfoProto]) -> None:
    from onnx import TensorProto

    for value in values:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
