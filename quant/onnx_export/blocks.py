"""FLUX's two blocks as ONNX graphs. Reads as ``quant/flux/blocks.py`` does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..emulation import SOFTMAX_SCALE
from ..flux.config import FluxConfig
from ..flux.layers import LAYER_NORM_EPS, RMS_NORM_EPS
from ..quantized_checkpoint import QuantizedCheckpoint
from .contract import (
    DOUBLE_MODULATION,
    MASK,
    PLAIN,
    SINGLE_MODULATION,
    Variant,
    block_kind,
    contract_metadata,
)
from .graph import BlockGraph
from .linears import linear

_TO_END = 2**62


def block_model(checkpoint: QuantizedCheckpoint, block: str, variant: Variant = PLAIN) -> ir.Model:
    """Author the ONNX model of one block.

    Inputs and outputs: ``img [B, N, D]`` and ``txt [B, T, D]`` to ``img_out``, ``txt_out``
    (double), or ``x [B, S, D]`` to ``x_out`` (single); ``cos`` and ``sin``, fp32
    ``[B, S, head_dim / 2]``; modulation vectors ``[B, 1, D]`` under the names of ``contract.py``.
    LoRA variants also have ``<linear>.lora_down [K, R]`` and ``<linear>.lora_up [R, N]``, masked
    ones ``mask [B, 1, S, S]``.

    Args:
        checkpoint: Header of the quantized checkpoint.
        block: For example ``single_blocks.3``.
        variant: What the graph takes besides.

    Returns:
        The model. Its weights are external: byte ranges of the checkpoint, by its file name.
    """
    author = _Author(BlockGraph(checkpoint, block, variant), checkpoint.metadata.config)
    outputs = author.double() if block_kind(block) == "double" else author.single()
    return author.graph.model(outputs, contract_metadata(checkpoint, block, variant))


def modulate(graph: BlockGraph, x: ir.Value, shift: ir.Value, scale: ir.Value) -> ir.Value:
    """Normalize ``x [B, L, D]`` without affine weights, then scale and shift by ``[B, 1, D]``."""
    ones = graph.constant("layer_norm_weight", np.ones(graph.hidden_size))
    normalized = graph.op("LayerNormalization", x, ones, axis=-1, epsilon=LAYER_NORM_EPS)
    factor = graph.op("Add", scale, graph.constant("one", 1.0))
    return graph.op("Add", graph.op("Mul", factor, normalized), shift)


class _Author:
    """Emits the layers of a block into a graph."""

    def __init__(self, graph: BlockGraph, config: FluxConfig) -> None:
        self.graph = graph
        self.config = config
        self.dim = config.hidden_size
        self.head_dim = config.hidden_size // config.num_heads

    def double(self) -> dict[str, ir.Value]:
        op, dim = self.graph.op, self.dim
        img, txt = self._tokens("img", "N"), self._tokens("txt", "T")
        cos, sin = self._rotary_inputs()
        mods = self._modulation_inputs(DOUBLE_MODULATION)
        img_mod, txt_mod = mods[:6], mods[6:]
        img_qkv = self._qkv("img_attn", self._modulate(img, *img_mod[:2]), "N")
        txt_qkv = self._qkv("txt_attn", self._modulate(txt, *txt_mod[:2]), "T")
        q, k, v = (op("Concat", *pair, axis=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        attn = self._attention(q, k, v, cos, sin)
        txt_tokens = op("Shape", txt, start=1, end=2)
        txt_attn = op("Slice", attn, self.graph.integers(0), txt_tokens, self.graph.integers(1))
        img_attn = op(
            "Slice", attn, txt_tokens, self.graph.integers(_TO_END), self.graph.integers(1)
        )
        img_out = self._update("img", img, img_attn, img_mod, "N")
        txt_out = self._update("txt", txt, txt_attn, txt_mod, "T")
        for value, tokens in ((img_out, "N"), (txt_out, "T")):
            value.shape, value.dtype = ir.Shape(("B", tokens, dim)), self.graph.high_precision
        return {"img_out": img_out, "txt_out": txt_out}

    def single(self) -> dict[str, ir.Value]:
        op, dim = self.graph.op, self.dim
        x = self._tokens("x", "S")
        cos, sin = self._rotary_inputs()
        shift, scale, gate = self._modulation_inputs(SINGLE_MODULATION)
        hidden = self._linear("linear1", self._modulate(x, shift, scale), ("B", "S", dim))
        sizes = self.graph.integers(3 * dim, self.config.mlp_in_size)
        qkv, mlp = self.graph.node("Split", (hidden, sizes), 2, axis=2)
        q, k, v = self._split_heads(qkv, "norm")
        attn = self._attention(q, k, v, cos, sin)
        hidden = op("Concat", attn, self._activation(mlp), axis=2)
        update = self._linear("linear2", hidden, ("B", "S", dim + self.config.mlp_size))
        x_out = op("Add", x, op("Mul", gate, update))
        x_out.shape, x_out.dtype = ir.Shape(("B", "S", dim)), self.graph.high_precision
        return {"x_out": x_out}

    def _tokens(self, name: str, tokens: str) -> ir.Value:
        return self.graph.input(name, ("B", tokens, self.dim), self.graph.high_precision)

    def _rotary_inputs(self) -> tuple[ir.Value, ir.Value]:
        shape = ("B", "S", self.head_dim // 2)
        cos = self.graph.input("cos", shape, ir.DataType.FLOAT)
        return cos, self.graph.input("sin", shape, ir.DataType.FLOAT)

    def _modulation_inputs(self, names: Sequence[str]) -> list[ir.Value]:
        shape = ("B", 1, self.dim)
        return [self.graph.input(name, shape, self.graph.high_precision) for name in names]

    def _linear(self, name: str, x: ir.Value, shape: tuple[int | str, ...]) -> ir.Value:
        return linear(self.graph, name, x, shape)

    def _modulate(self, x: ir.Value, shift: ir.Value, scale: ir.Value) -> ir.Value:
        return modulate(self.graph, x, shift, scale)

    def _qkv(self, attn: str, x: ir.Value, tokens: str) -> list[ir.Value]:
        qkv = self._linear(f"{attn}.qkv", x, ("B", tokens, self.dim))
        return self._split_heads(qkv, f"{attn}.norm")

    def _split_heads(self, qkv: ir.Value, norm: str) -> list[ir.Value]:
        op = self.graph.op
        heads = self.graph.integers(0, 0, self.config.num_heads, self.head_dim)
        # Split, not Slice: TensorRT-RTX 1.7 moves slices into the weight and loses the FP4 GEMM
        parts = [
            op("Transpose", op("Reshape", part, heads), perm=[0, 2, 1, 3])
            for part in self.graph.node("Split", (qkv,), 3, axis=2, num_outputs=3)
        ]
        for index, which in enumerate(("query_norm", "key_norm")):
            weight = self.graph.stored(f"{norm}.{which}.scale")
            parts[index] = op(
                "RMSNormalization", parts[index], weight, axis=-1, epsilon=RMS_NORM_EPS
            )
        return parts

    def _attention(
        self, q: ir.Value, k: ir.Value, v: ir.Value, cos: ir.Value, sin: ir.Value
    ) -> ir.Value:
        op = self.graph.op
        # explicit MatMul-Softmax-MatMul with all four tensors quantized is the one form that
        # TensorRT-RTX 1.7 fuses into an FP8 kernel; unquantized it fuses as well
        q = self._quantized(self._rotated(q, cos, sin), "q")
        k = self._quantized(self._rotated(k, cos, sin), "k")
        v = self._quantized(v, "v")
        transposed = op("Transpose", k, perm=[0, 1, 3, 2])
        scores = op("MatMul", q, transposed, name="attention/QK")
        if self.graph.variant.mask:
            # TensorRT-RTX 1.7 takes it into the same fused kernel
            mask = self.graph.input(MASK, ("B", 1, "S", "S"), self.graph.high_precision)
            scores = op("Add", scores, mask, name="attention/Mask")
        softmax = self._quantized(op("Softmax", scores, axis=-1, name="attention/Softmax"), None)
        attended = op("MatMul", softmax, v, name="attention/PV")
        attended = op("Transpose", attended, perm=[0, 2, 1, 3])
        return op("Reshape", attended, self.graph.integers(0, 0, self.dim))

    def _rotated(self, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        op = self.graph.op
        # fp32 as in ComfyUI: bf16 holds the angles of far positions to two digits only
        rotated = op("Cast", x, to=int(ir.DataType.FLOAT))
        rotated = op("RotaryEmbedding", rotated, cos, sin, interleaved=1)
        rotated = op("Mul", rotated, self.graph.attention_root_scale(self.head_dim))
        return op("Cast", rotated, to=int(self.graph.high_precision))

    def _quantized(self, x: ir.Value, part: str | None) -> ir.Value:
        if not self.graph.has("attention.q_scale"):
            return x
        if part is None:
            scale = self.graph.constant("softmax_scale", SOFTMAX_SCALE)
        else:
            scale = self.graph.stored(f"attention.{part}_scale")
        name = f"attention/{part or 'softmax'}"
        quantized = self.graph.op(
            "QuantizeLinear", x, scale, self.graph.fp8_zero(), name=f"{name}_Q"
        )
        return self.graph.op("DequantizeLinear", quantized, scale, name=f"{name}_DQ")

    def _activation(self, x: ir.Value) -> ir.Value:
        op = self.graph.op
        if not self.config.gated_mlp:
            return op("Gelu", x, approximate="tanh")
        # Split for the same reason as for qkv; opset 23 has no Swish
        gate, value = self.graph.node("Split", (x,), 2, axis=2, num_outputs=2)
        return op("Mul", op("Mul", gate, op("Sigmoid", gate)), value)

    def _update(
        self, stream: str, x: ir.Value, attn: ir.Value, mods: Sequence[ir.Value], tokens: str
    ) -> ir.Value:
        op, dim = self.graph.op, self.dim
        _, _, gate1, shift2, scale2, gate2 = mods
        attended = self._linear(f"{stream}_attn.proj", attn, ("B", tokens, dim))
        x = op("Add", x, op("Mul", gate1, attended))
        hidden = self._linear(
            f"{stream}_mlp.0", self._modulate(x, shift2, scale2), ("B", tokens, dim)
        )
        hidden = self._activation(hidden)
        update = self._linear(f"{stream}_mlp.2", hidden, ("B", tokens, self.config.mlp_size))
        return op("Add", x, op("Mul", gate2, update))
