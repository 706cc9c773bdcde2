"""Rewrites a block's ONNX so that ONNX Runtime computes on a CPU exactly what the FP4 graph means.

ONNX Runtime 1.32 has no FLOAT4E2M1 kernels and no bf16 MatMul on the CPU. Every E2M1 value is exact
in E4M3, so FP4 tensors travel as FP8; the quantizer of TensorRT's domain becomes a local function;
bf16 and fp16 become fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .signature import DYNAMIC_QUANTIZE

if TYPE_CHECKING:
    import onnx

NVFP4_BLOCK = 16
"""Values that share an E4M3 scale (NVFP4 format)."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E2M1_IN_E4M3 = (0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C)
"""E4M3 codes of 0, 0.5, 1, 1.5, 2, 3, 4, 6, in the order of the E2M1 codes 0 to 7."""

SMALLEST_SCALE = 1e-30
"""Divisor for blocks whose scale is 0; their values are then multiplied by 0, so 0 stays exact."""


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
    448; then q = E2M1(x / (s gscale)) with ties to even, on the grid of step 0.5 below 2, 1 below
    4, and 2 up to 6.
    """
    from onnx import TensorProto, helper

    constants = {
        "six": _scalar(E2M1_MAX),
        "minus_six": _scalar(-E2M1_MAX),
        "largest": _scalar(E4M3_MAX),
        "smallest": _scalar(SMALLEST_SCALE),
        "half": _scalar(0.5),
        "one": _scalar(1),
        "two": _scalar(2),
        "four": _scalar(4),
        "first": _integers(0),
        "last": _integers(-1),
        "blocked": _integers(-1, NVFP4_BLOCK),
    }
    nodes = [
        helper.make_node("Constant", [], [name], value=value) for name, value in constants.items()
    ]

    def op(kind: str, inputs: str, output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, inputs.split(), [output], **attributes))

    op("Shape", "x", "shape")
    op("Slice", "shape first last", "leading")
    op("Concat", "leading blocked", "block_shape", axis=0)
    op("Reshape", "x block_shape", "blocks")
    op("Abs", "blocks", "block_magnitudes")
    op("ReduceMax", "block_magnitudes last", "amax", keepdims=0)
    op("Mul", "six gscale", "divisor")
    op("Div", "amax divisor", "scale")
    op("Min", "scale largest", "bounded")
    op("Cast", "bounded", "s", to=TensorProto.FLOAT8E4M3FN)
    op("Cast", "s", "rounded_scale", to=TensorProto.FLOAT)
    op("Mul", "rounded_scale gscale", "step")
    op("Max", "step smallest", "safe_step")
    op("Unsqueeze", "safe_step last", "block_step")
    op("Div", "blocks block_step", "scaled")
    op("Clip", "scaled minus_six six", "clipped")
    op("Abs", "clipped", "magnitude")
    op("Less", "magnitude two", "below_two")
    op("Less", "magnitude four", "below_four")
    op("Where", "below_four one two", "upper_grid")
    op("Where", "below_two half upper_grid", "grid")
    op("Div", "clipped grid", "in_steps")
    op("Round", "in_steps", "whole_steps")
    op("Mul", "whole_steps grid", "values")
    op("Reshape", "values shape", "reshaped")
    op("Cast", "reshaped", "q", to=TensorProto.FLOAT8E4M3FN)
    return helper.make_function(
        "trt",
        DYNAMIC_QUANTIZE,
        ["x", "gscale"],
        ["q", "s"],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=["axis", "block_size", "scale_type"],
    )


def _scalar(value: float) -> onnx.TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array(value, np.float32))


def _integers(*values: int) -> onnx.TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array(values, np.int64))


def _convert_initializer(tensor: onnx.TensorProto) -> None:
    from onnx import TensorProto, numpy_helper

    if tensor.data_type == TensorProto.FLOAT4E2M1:
        tensor.raw_data = fp8_from_packed_fp4(tensor.raw_data)
        tensor.data_type = TensorProto.FLOAT8E4M3FN
    elif tensor.data_type in (TensorProto.BFLOAT16, TensorProto.FLOAT16):
        promoted = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(promoted, tensor.name))


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
