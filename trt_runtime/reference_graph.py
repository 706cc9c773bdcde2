"""Rewrites a block's ONNX so that ONNX Runtime computes on a CPU exactly what the FP4 graph means.

ONNX Runtime 1.32 has no FLOAT4E2M1 kernels and no bf16 MatMul on the CPU, and its FP8 kernels are
slow. So everything is fp32 here, and rounding to E2M1 and E4M3 is arithmetic: a value that is
quantized is an fp32 that E2M1 or E4M3 could hold. Matrices become inputs, as `reference_weights`
reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .errors.blocks import BlockContractError
from .reference_weights import NVFP4_BLOCK, StoredMatrix

if TYPE_CHECKING:
    import onnx

DOMAIN = "flux_fp4"
"""Of the functions that this module adds."""

ROUND_MAGNITUDE_TEXT = """
<domain: "flux_fp4", opset_import: ["" : OPSET]>
RoundMagnitude <normal, largest, splitter> (x) => (y) {
    normal = Constant <value_float: float = @normal> ()
    largest = Constant <value_float: float = @largest> ()
    splitter = Constant <value_float: float = @splitter> ()
    saturated = Clip (x, , largest)
    leading = Clip (saturated, normal)
    rounder = Mul (leading, splitter)
    difference = Sub (rounder, saturated)
    y = Sub (rounder, difference)
}
"""
"""Rounds fp32 that are not negative to a format of p significand bits, ties to even.

Veltkamp's splitting (Dekker, A floating-point technique for extending the available precision,
1971): with the splitter 2**(24 - p) + 1, the difference is an fp32 whose last place is the format's
last place of x. Below the smallest normal number that place stays the one of the normal number: the
format's subnormals. Every tie and both of its neighbours are tested against a cast.
"""

E2M1 = "normal: float = 1.0, largest: float = 6.0, splitter: float = 4194305.0"
"""Attributes of RoundMagnitude: two significand bits, hence 2**22 + 1."""

E4M3 = "normal: float = 0.015625, largest: float = 448.0, splitter: float = 1048577.0"
"""Four significand bits, hence 2**20 + 1."""

DYNAMIC_QUANTIZE_TEXT = f"""
<domain: "trt", opset_import: ["" : OPSET, "flux_fp4" : 1]>
TRT_FP4DynamicQuantize <axis, block_size, scale_type> (x, gscale) => (q, s) {{
    six = Constant <value_float: float = 6.0> ()
    smallest = Constant <value_float: float = 1e-30> ()
    first = Constant <value_ints: ints = [0]> ()
    last = Constant <value_ints: ints = [-1]> ()
    block = Constant <value_ints: ints = [-1, 16]> ()
    all = Constant <value_ints: ints = [-1]> ()

    shape = Shape (x)
    blocks = Reshape (x, block)
    magnitudes = Abs (blocks)
    amax = ReduceMax <keepdims: int = 0> (magnitudes, last)
    divisor = Mul (six, gscale)
    scale = Div (amax, divisor)
    rounded_scale = flux_fp4.RoundMagnitude <{E4M3}> (scale)

    step = Mul (rounded_scale, gscale)
    safe_step = Clip (step, smallest)
    block_step = Unsqueeze (safe_step, last)
    scaled = Div (magnitudes, block_step)
    rounded = flux_fp4.RoundMagnitude <{E2M1}> (scaled)
    signs = Sign (blocks)
    values = Mul (rounded, signs)
    q = Reshape (values, shape)

    leading = Slice (shape, first, last)
    scale_shape = Concat <axis: int = 0> (leading, all)
    s = Reshape (rounded_scale, scale_shape)
}}
"""
"""NVFP4: per block of 16, s = E4M3(amax / (6 gscale)), then q = E2M1(x / (s gscale)).

Where a scale rounds to 0 the divisor is 1e-30: whatever q is then, it is multiplied by 0. Scales
are flat until the end: ONNX Runtime takes shapes such as [R, 1] one element at a time."""

DEQUANTIZE_BLOCKS_TEXT = """
<domain: "flux_fp4", opset_import: ["" : OPSET]>
DequantizeBlocks (q, scale) => (y) {
    block = Constant <value_ints: ints = [-1, 16]> ()
    single = Constant <value_ints: ints = [-1, 1]> ()
    shape = Shape (q)
    blocks = Reshape (q, block)
    steps = Reshape (scale, single)
    values = Mul (blocks, steps)
    y = Reshape (values, shape)
}
"""

QUANTIZE_TO_E4M3_TEXT = f"""
<domain: "flux_fp4", opset_import: ["" : OPSET, "flux_fp4" : 1]>
QuantizeToE4M3 (x, scale) => (q) {{
    scaled = Div (x, scale)
    magnitude = Abs (scaled)
    rounded = flux_fp4.RoundMagnitude <{E4M3}> (magnitude)
    sign = Sign (scaled)
    q = Mul (rounded, sign)
}}
"""


def reference_model(path: Path) -> tuple[onnx.ModelProto, dict[str, StoredMatrix]]:
    """Load a checked block file with its weights and rewrite it for ONNX Runtime's CPU provider.

    Returns:
        The graph in fp32, and its matrices by the names of the inputs that take them,
        dequantized, ``[N, K]``.

    Raises:
        BlockContractError: A quantized matrix is not dequantized as an export does it.
    """
    import onnx

    model = onnx.load(path)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    try:
        matrices = _take_matrices(model.graph)
        stored = {tensor.name for tensor in model.graph.initializer}
        for node in model.graph.node:
            _promote_attributes(node)
            _rewrite_quantization(node, stored)
    except (IndexError, ValueError) as error:  # a node without the inputs it must have
        raise BlockContractError(path, str(error)) from error
    # zero points
    _drop_unused(model.graph, matrices)
    for tensor in model.graph.initializer:
        _promote_initializer(tensor)
    del model.graph.value_info[:]
    _promote_values((*model.graph.input, *model.graph.output))
    for name, matrix in matrices.items():
        shape = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, matrix.shape)
        model.graph.input.append(shape)
    del model.functions[:]
    model.functions.extend(quantization_functions(opset))
    model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return model, matrices


def quantization_functions(opset: int) -> list[onnx.FunctionProto]:
    """Return what quantizes, as functions of standard operators.

    ``trt::TRT_FP4DynamicQuantize(x, gscale) -> (q, s)`` is the operator of TensorRT's domain, its
    results in fp32; the others are of this module's own domain.
    """
    from onnx import parser

    texts = (
        ROUND_MAGNITUDE_TEXT,
        DYNAMIC_QUANTIZE_TEXT,
        DEQUANTIZE_BLOCKS_TEXT,
        QUANTIZE_TO_E4M3_TEXT,
    )
    return [parser.parse_function(text.replace("OPSET", str(opset))) for text in texts]


def _take_matrices(graph: onnx.GraphProto) -> dict[str, StoredMatrix]:
    """Remove matrices, and the nodes that dequantize them, from a graph; it must feed them."""
    from onnx import TensorProto

    matrices = {}
    for blocked in (True, False):  # a block scale is a matrix, too, but of another one
        constants = _Constants(graph)
        for node in graph.node:
            if node.op_type == "DequantizeLinear" and _has_blocks(node) == blocked:
                codes = constants.stored.get(node.input[0])
                if codes is not None and _is_matrix(codes):
                    matrices[node.output[0]] = constants.matrix(node, codes)
        _drop_unused(graph, matrices)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT4E2M1:
            raise ValueError(f"'{tensor.name}' is not dequantized in blocks")
        if _is_matrix(tensor):
            matrices[tensor.name] = StoredMatrix.from_initializer(tensor)
    _drop_unused(graph, matrices)
    return matrices


class _Constants:
    """Finds what a graph stores, behind the nodes that make something of it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {output: node for node in graph.node for output in node.output}

    def matrix(self, node: onnx.NodeProto, codes: onnx.TensorProto) -> StoredMatrix:
        """Read a matrix with the scales of the node that dequantizes it."""
        scale = self._uncast(node.input[1])
        if not _has_blocks(node) and scale in self.stored:
            return StoredMatrix.from_initializer(codes, self.stored[scale])
        if _has_blocks(node) and scale in self._makers:
            maker = self._makers[scale]
            parts = [self._uncast(name) for name in maker.input[:2]]
            if maker.op_type == "DequantizeLinear" and self.stored.keys() >= set(parts):
                block_scale, global_scale = (self.stored[name] for name in parts)
                return StoredMatrix.from_initializer(codes, global_scale, block_scale)
        raise ValueError(f"the scale of '{codes.name}' is not stored")

    def _uncast(self, name: str) -> str:
        """Return what was cast, if it was: in fp32 that changes nothing."""
        maker = self._makers.get(name)
        return maker.input[0] if maker is not None and maker.op_type == "Cast" else name


def _is_matrix(tensor: onnx.TensorProto) -> bool:
    return len(tensor.dims) == 2 and bool(tensor.raw_data)


def _drop_unused(graph: onnx.GraphProto, fed: Mapping[str, StoredMatrix]) -> None:
    """Remove nodes and initializers that no output needs once some values are fed."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output) - fed.keys():
            needed |= set(node.input)
            kept.append(node)
    initializers = [t for t in graph.initializer if t.name in needed and t.name not in fed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(initializers)


def _has_blocks(node: onnx.NodeProto) -> bool:
    """Tell whether a DequantizeLinear has a scale per block; other blocks than NVFP4's are errors.

    Raises:
        ValueError: The blocks are not 16 values of a row.
    """
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if not attributes.get("block_size"):
        return False
    if (attributes["block_size"], attributes.get("axis")) != (NVFP4_BLOCK, -1):
        raise ValueError(f"'{node.name}' dequantizes blocks other than 16 values of a row")
    return True


def _rewrite_quantization(node: onnx.NodeProto, stored: Iterable[str]) -> None:
    """Write Q and DQ of what is computed as arithmetic; ``stored`` stays FP8."""
    if node.op_type == "QuantizeLinear":
        node.op_type, node.domain = "QuantizeToE4M3", DOMAIN
    elif node.op_type == "DequantizeLinear" and node.input[0] not in stored:
        if _has_blocks(node):
            node.op_type, node.domain = "DequantizeBlocks", DOMAIN
        else:
            node.op_type = "Mul"
    else:
        return
    # no zero point: that of floating point formats is 0
    del node.input[2:], node.attribute[:]


def _promote_initializer(tensor: onnx.TensorProto) -> None:
    import numpy as np
    from onnx import TensorProto, numpy_helper

    if tensor.data_type in (TensorProto.BFLOAT16, TensorProto.FLOAT16):
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
