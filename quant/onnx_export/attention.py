"""Joint attention of FLUX as ONNX nodes: RMS norms of q and k, RoPE, and the fused product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

from ..emulation import SOFTMAX_SCALE
from ..flux.config import FluxConfig
from ..flux.layers import RMS_NORM_EPS
from .contract import MASK
from .graph import BlockGraph


class Stream(NamedTuple):
    """What attention takes of a stream of tokens."""

    qkv: ir.Value
    """q, k and v side by side, ``[B, L, 3 * D]``, with bias."""
    norm: str
    """The module, relative to the block, that holds the norms of q and k."""
    tokens: ir.Value
    """L, int64 ``[1]``."""


class Attention:
    """Emits attention over all tokens of a block."""

    def __init__(self, graph: BlockGraph, config: FluxConfig) -> None:
        self.graph = graph
        self.dim, self.heads, self.head_dim = (
            config.hidden_size,
            config.num_heads,
            config.head_dim,
        )

    def attended(self, streams: Sequence[Stream], cos: ir.Value, sin: ir.Value) -> ir.Value:
        """Let the tokens of all streams attend to each other.

        Args:
            streams: In the order of their tokens.
            cos: fp32 ``[B, S, head_dim / 2]``.
            sin: As ``cos``.

        Returns:
            ``[B, heads, S, head_dim]``.
        """
        qkv, weight = self._joined(streams)
        # Split, not Slice: TensorRT-RTX 1.7 moves slices into the weight and loses the FP4 GEMM
        sizes = self.graph.integers(2 * self.dim, self.dim)
        qk, v = self.graph.node("Split", (qkv, sizes), 2, axis=2)
        q, k = self._normed_and_rotated(qk, weight, cos, sin)
        v = self.graph.op("Reshape", v, self.graph.integers(0, 0, self.heads, self.head_dim))
        return self._product(q, k, self.graph.op("Transpose", v, perm=[0, 2, 1, 3]))

    def _joined(self, streams: Sequence[Stream]) -> tuple[ir.Value, ir.Value]:
        """Return q, k and v of all tokens, and what the norm of each multiplies q and k by."""
        op = self.graph.op
        if len(streams) == 1:
            return streams[0].qkv, self._norm_weight(streams[0].norm)
        sizes = self.graph.integers(1), self.graph.integers(1, 1)
        weights = [
            op("Expand", self._norm_weight(norm), op("Concat", sizes[0], tokens, sizes[1], axis=0))
            for _, norm, tokens in streams
        ]
        qkv = op("Concat", *(stream.qkv for stream in streams), axis=1)
        return qkv, op("Concat", *weights, axis=1)

    def _norm_weight(self, norm: str) -> ir.Value:
        """Return ``[1, 1, 2 * heads, head_dim]``; the builder folds it into one constant."""
        shape = self.graph.integers(1, 1, self.heads, self.head_dim)
        weights = [
            self.graph.op("Expand", self.graph.stored(f"{norm}.{which}.scale"), shape)
            for which in ("query_norm", "key_norm")
        ]
        return self.graph.op("Concat", *weights, axis=2)

    def _normed_and_rotated(
        self, qk: ir.Value, weight: ir.Value, cos: ir.Value, sin: ir.Value
    ) -> tuple[ir.Value, ...]:
        """Normalize q and k, rotate them, and multiply each by ``head_dim ** -0.25``.

        The norm is ``x * weight / RMS(x)`` (``layers.RMSNorm``), and written out: only the RMS
        needs a sum, so the rest joins the kernels before and behind it. RMSNormalization is a
        kernel of its own for each of q and k, between one that splits and one that rotates.
        q and k are one tensor of ``2 * heads`` heads until both are rotated, for the same reason.
        """
        op, fp32 = self.graph.op, int(ir.DataType.FLOAT)
        qk = op("Reshape", qk, self.graph.integers(0, 0, 2 * self.heads, self.head_dim))
        wide = op("Cast", qk, to=fp32)
        mean = op("ReduceMean", op("Mul", wide, wide), self.graph.integers(-1), keepdims=1)
        mean = op("Add", mean, self.graph.fp32_constant("rms_norm_eps", RMS_NORM_EPS))
        inverse_rms = op("Reciprocal", op("Sqrt", mean))
        # times the weight before the cast: so bf16 and not fp32 goes from kernel to kernel.
        # ComfyUI rounds once as well, behind the norm
        x = op("Mul", op("Cast", op("Mul", qk, weight), to=fp32), inverse_rms)
        # fp32 as in ComfyUI: bf16 holds the angles of far positions to two digits only
        x = op("Transpose", x, perm=[0, 2, 1, 3])
        x = op("RotaryEmbedding", x, cos, sin, interleaved=1)
        x = op("Mul", x, self.graph.attention_root_scale(self.head_dim))
        x = op("Cast", x, to=int(self.graph.high_precision))
        return self.graph.node("Split", (x,), 2, axis=1, num_outputs=2)

    def _product(self, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        op = self.graph.op
        # explicit MatMul-Softmax-MatMul with all four tensors quantized is the one form that
        # TensorRT-RTX 1.7 fuses into an FP8 kernel; unquantized it fuses as well
        q, k, v = (self._quantized(x, part) for x, part in ((q, "q"), (k, "k"), (v, "v")))
        scores = op("MatMul", q, op("Transpose", k, perm=[0, 1, 3, 2]), name="attention/QK")
        if self.graph.variant.mask:
            # TensorRT-RTX 1.7 takes it into the same fused kernel
            mask = self.graph.input(MASK, ("B", 1, "S", "S"), self.graph.high_precision)
            scores = op("Add", scores, mask, name="attention/Mask")
        softmax = self._quantized(op("Softmax", scores, axis=-1, name="attention/Softmax"), None)
        return op("MatMul", softmax, v, name="attention/PV")

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
