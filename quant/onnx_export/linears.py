"""The Linears of a block as ONNX nodes, each in the format that the checkpoint stores."""

from __future__ import annotations

import onnx_ir as ir

from ..nvfp4 import NVFP4_BLOCK
from .contract import RANK_TILE, lora_down, lora_rank_axis, lora_up
from .graph import TRT_DOMAIN, BlockGraph


def linear(graph: BlockGraph, name: str, x: ir.Value, shape: tuple[int | str, ...]) -> ir.Value:
    """Emit one Linear with its bias.

    The MatMul of the stored weight is called ``<name>/MatMul``: the lint of the builder's log
    looks for it. In the LoRA variant of a block, every Linear has a branch whose factors are graph
    inputs; it reads ``x`` after smoothing and before quantization, as SVDQuant's does.

    Args:
        graph: The block's graph.
        name: Of the Linear, relative to the block.
        x: Input ``[B, L, K]``.
        shape: Shape of ``x``.

    Returns:
        ``[B, L, N]`` in the high-precision type.
    """
    if graph.has(f"{name}.pre_quant_scale"):
        scale = graph.stored(f"{name}.pre_quant_scale")
        x = graph.op("Mul", x, scale, name=f"{name}/Smooth")
    kind = graph.linear_format(name)
    if kind == "nvfp4":
        y = nvfp4_linear(graph, name, x, shape)
    elif kind == "fp8":
        y = fp8_linear(graph, name, x)
    else:
        y = graph.op("MatMul", x, _transposed(graph, f"{name}.weight"), name=f"{name}/MatMul")
    if graph.variant.lora and kind != "nvfp4":
        y = graph.op("Add", y, _input_branch(graph, name, x), name=f"{name}/Branch")
    if graph.has(f"{name}.bias"):
        y = graph.op("Add", y, graph.stored(f"{name}.bias"), name=f"{name}/Bias")
    return y


def nvfp4_linear(
    graph: BlockGraph, linear: str, x: ir.Value, shape: tuple[int | str, ...]
) -> ir.Value:
    """Emit one NVFP4 Linear with its low-rank branch, if it has one, but without its bias.

    Two DequantizeLinear on the weight, ``TRT_FP4DynamicQuantize`` and two DequantizeLinear on the
    input, as in ModelOpt 0.47's ``nvfp4_exporter.py`` but for one thing: the scales are cast to
    the high-precision type *before* they dequantize. Cast after it, as ModelOpt does, TensorRT-RTX
    1.7.1 moves the split into q, k and v through the cast into the weight and runs qkv as a bf16
    GEMM over a dequantized weight.

    Args:
        graph: The block's graph.
        linear: Name relative to the block.
        x: Input ``[B, L, K]``.
        shape: Shape of ``x``.
    """
    # rank 2 between Quantize and MatMul, at no kernel's cost: with rank 3 and a dynamic batch,
    # TensorRT-RTX 1.7.1 fails to build where the smallest batch equals the number of heads
    lead = graph.op("Shape", x, start=0, end=2)
    x = graph.op("Reshape", x, graph.integers(-1, int(shape[-1])))
    weight = graph.op(
        "Transpose", _nvfp4_weight(graph, linear), name=f"{linear}/Transpose", perm=[1, 0]
    )
    rounded = _nvfp4_input(graph, linear, x, int(shape[-1]))
    y = graph.op("MatMul", rounded, weight, name=f"{linear}/MatMul")
    if graph.variant.lora:
        # the factors hold SVDQuant's branch as well: one pair of GEMMs serves both
        y = graph.op("Add", y, _input_branch(graph, linear, x), name=f"{linear}/Branch")
    elif graph.has(f"{linear}.svd_down"):
        y = graph.op("Add", y, _stored_branch(graph, linear, x), name=f"{linear}/Branch")
    return graph.op("Reshape", y, graph.op("Concat", lead, graph.integers(-1), axis=0))


def _nvfp4_input(graph: BlockGraph, linear: str, x: ir.Value, width: int) -> ir.Value:
    input_scale = graph.stored(f"{linear}.input_scale")
    codes, scale = graph.node(
        "TRT_FP4DynamicQuantize",
        (x, input_scale),
        2,
        f"{linear}/Quantize",
        TRT_DOMAIN,
        axis=-1,
        block_size=NVFP4_BLOCK,
        scale_type=int(ir.DataType.FLOAT8E4M3FN),
    )
    # shape inference knows no operator of TensorRT's domain
    codes.dtype, codes.shape = ir.DataType.FLOAT4E2M1, ir.Shape((None, width))
    scale.dtype, scale.shape = ir.DataType.FLOAT8E4M3FN, ir.Shape((None, width // NVFP4_BLOCK))
    return _dequantized(graph, linear, "input", codes, scale, input_scale)


def _nvfp4_weight(graph: BlockGraph, linear: str) -> ir.Value:
    codes = graph.stored(f"{linear}.weight")
    block_scale = graph.stored(f"{linear}.weight_scale")
    global_scale = graph.stored(f"{linear}.weight_scale_2")
    return _dequantized(graph, linear, "weight", codes, block_scale, global_scale)


def _dequantized(
    graph: BlockGraph,
    linear: str,
    part: str,
    codes: ir.Value,
    block_scale: ir.Value,
    global_scale: ir.Value,
) -> ir.Value:
    name = f"{linear}/DQ_{part}"
    scale = graph.op("DequantizeLinear", block_scale, global_scale, name=f"{name}_scale")
    to = int(graph.high_precision)
    scale = graph.op("Cast", scale, name=f"{linear}/Cast_{part}_scale", to=to)
    return graph.op("DequantizeLinear", codes, scale, name=name, axis=-1, block_size=NVFP4_BLOCK)


def fp8_linear(graph: BlockGraph, linear: str, x: ir.Value) -> ir.Value:
    """Emit one FP8 Linear without its bias: static input scale, a weight scale per output row.

    The row scales multiply the MatMul's output, in fp32, at no kernel's cost. In DequantizeLinear
    they are lost on qkv: TensorRT-RTX 1.7.1 moves the split into q, k and v through them into the
    weight, which a separate kernel then dequantizes for a GEMM of FP8 by bf16.

    Args:
        graph: The block's graph.
        linear: Name relative to the block.
        x: Input ``[B, L, K]``.
    """
    high_precision = int(graph.high_precision)
    scale = graph.stored(f"{linear}.input_scale")
    scale = graph.op("Cast", scale, name=f"{linear}/Cast_input_scale", to=high_precision)
    codes = graph.op("QuantizeLinear", x, scale, graph.fp8_zero(), name=f"{linear}/Quantize")
    dequantized = graph.op("DequantizeLinear", codes, scale, name=f"{linear}/DQ_input")
    one = graph.constant("one", 1.0)
    weight = graph.op(
        "DequantizeLinear", graph.stored(f"{linear}.weight"), one, name=f"{linear}/DQ_weight"
    )
    weight = graph.op("Transpose", weight, name=f"{linear}/Transpose", perm=[1, 0])
    y = graph.op("MatMul", dequantized, weight, name=f"{linear}/MatMul")
    y = graph.op("Cast", y, name=f"{linear}/Cast_output", to=int(ir.DataType.FLOAT))
    y = graph.op("Mul", y, graph.stored(f"{linear}.weight_scale"), name=f"{linear}/Rows")
    return graph.op("Cast", y, name=f"{linear}/Cast_rows", to=high_precision)


def _input_branch(graph: BlockGraph, name: str, x: ir.Value) -> ir.Value:
    outputs, inputs = graph.linear_shape(name)
    rank = lora_rank_axis(name)
    down = graph.input(lora_down(name), (inputs, rank, RANK_TILE), graph.high_precision)
    up = graph.input(lora_up(name), (rank, RANK_TILE, outputs), graph.high_precision)
    down = graph.op("Reshape", down, graph.integers(inputs, -1))
    up = graph.op("Reshape", up, graph.integers(-1, outputs))
    y = graph.op("MatMul", x, down, name=f"{name}/Down")
    return graph.op("MatMul", y, up, name=f"{name}/Up")


def _stored_branch(graph: BlockGraph, name: str, x: ir.Value) -> ir.Value:
    down = graph.op("MatMul", x, _transposed(graph, f"{name}.svd_down"), name=f"{name}/Down")
    return graph.op("MatMul", down, _transposed(graph, f"{name}.svd_up"), name=f"{name}/Up")


def _transposed(graph: BlockGraph, tensor: str) -> ir.Value:
    return graph.op("Transpose", graph.stored(tensor), name=f"{tensor}/Transpose", perm=[1, 0])
