"""FLUX's two blocks as ONNX graphs. Reads as ``quant/flux/blocks.py`` does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..flux.config import FluxConfig, block_linears
from ..flux.layers import LAYER_NORM_EPS
from ..quantized_checkpoint import QuantizedCheckpoint
from .attention import Attention, Stream
from .contract import (
    DOUBLE_MODULATION,
    PLAIN,
    SINGLE_MODULATION,
    Variant,
    block_kind,
    contract_metadata,
)
from .graph import BlockGraph
from .linears import linear
from .token_tiles import TokenTiles

_TO_END = 2**62


def block_model(checkpoint: QuantizedCheckpoint, block: str, variant: Variant = PLAIN) -> ir.Model:
    """Author the ONNX model of one block.

    Inputs and outputs: ``img [B, N, D]`` and ``txt [B, T, D]`` to ``img_out``, ``txt_out``
    (double), or ``x [B, S, D]`` to ``x_out`` (single); ``cos`` and ``sin``, fp32
    ``[B, S, head_dim / 2]``; modulation vectors ``[B, 1, D]`` under the names of ``contract.py``.
    LoRA variants also have ``<linear>.lora_down [K, R, 16]`` and ``<linear>.lora_up [R, 16, N]``,
    factors of rank ``16 * R``; masked ones ``mask [B, 1, S, S]``.

    Args:
        checkpoint: Header of the quantized checkpoint.
        block: For example ``single_blocks.3``.
        variant: What the graph takes besides.

    Returns:
        The model. Its weights are external: byte ranges of the checkpoint, by its file name.
    """
    linears = (f"{block}.{linear}" for linear in block_linears(block))
    tiled = any(checkpoint.linear_format(linear) == "nvfp4" for linear in linears)
    author = _Author(BlockGraph(checkpoint, block, variant), checkpoint.metadata.config, tiled)
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

    def __init__(self, graph: BlockGraph, config: FluxConfig, tiled: bool) -> None:
        self.graph = graph
        self.config = config
        self.tiled = tiled
        self.dim, self.head_dim = config.hidden_size, config.head_dim
        self.attention = Attention(graph, config)

    def double(self) -> dict[str, ir.Value]:
        img, txt = self._tokens("img", "N"), self._tokens("txt", "T")
        cos, sin = self._rotary_inputs()
        mods = self._modulation_inputs(DOUBLE_MODULATION)
        img_mod, txt_mod = mods[:6], mods[6:]
        img_tiles, txt_tiles = self._tiles(img), self._tiles(txt)
        img, txt = img_tiles.pad(img), txt_tiles.pad(txt)
        img_qkv = self._linear("img_attn.qkv", self._modulate(img, *img_mod[:2]), self.dim)
        txt_qkv = self._linear("txt_attn.qkv", self._modulate(txt, *txt_mod[:2]), self.dim)
        streams = (
            Stream(txt_tiles.cut(txt_qkv), "txt_attn.norm", txt_tiles.tokens),
            Stream(img_tiles.cut(img_qkv), "img_attn.norm", img_tiles.tokens),
        )
        attn = self.attention.attended(streams, cos, sin)
        begin, end, axis = (self.graph.integers(number) for number in (0, _TO_END, 2))
        txt_attn = self.graph.op("Slice", attn, begin, txt_tiles.tokens, axis)
        img_attn = self.graph.op("Slice", attn, txt_tiles.tokens, end, axis)
        img = self._update("img", img, img_tiles.merged_heads(img_attn), img_mod)
        txt = self._update("txt", txt, txt_tiles.merged_heads(txt_attn), txt_mod)
        return {
            "img_out": self._output(img_tiles.cut(img), "N"),
            "txt_out": self._output(txt_tiles.cut(txt), "T"),
        }

    def single(self) -> dict[str, ir.Value]:
        op, dim = self.graph.op, self.dim
        x = self._tokens("x", "S")
        cos, sin = self._rotary_inputs()
        shift, scale, gate = self._modulation_inputs(SINGLE_MODULATION)
        tiles = self._tiles(x)
        hidden = self._linear("linear1", self._modulate(tiles.pad(x), shift, scale), dim)
        sizes = self.graph.integers(3 * dim, self.config.mlp_in_size)
        qkv, mlp = self.graph.node("Split", (hidden, sizes), 2, axis=2)
        stream = Stream(tiles.cut(qkv), "norm", tiles.tokens)
        attn = tiles.merged_heads(self.attention.attended([stream], cos, sin))
        hidden = op("Concat", attn, self._activation(mlp), axis=2)
        update = tiles.cut(self._linear("linear2", hidden, dim + self.config.mlp_size))
        # x itself and not its padded copy, which would have to be kept along the block
        return {"x_out": self._output(op("Add", x, op("Mul", gate, update)), "S")}

    def _tiles(self, x: ir.Value) -> TokenTiles:
        return TokenTiles(self.graph, x, self.tiled)

    def _output(self, value: ir.Value, tokens: str) -> ir.Value:
        value.shape, value.dtype = ir.Shape(("B", tokens, self.dim)), self.graph.high_precision
        return value

    def _tokens(self, name: str, tokens: str) -> ir.Value:
        return self.graph.input(name, ("B", tokens, self.dim), self.graph.high_precision)

    def _rotary_inputs(self) -> tuple[ir.Value, ir.Value]:
        shape = ("B", "S", self.head_dim // 2)
        cos = self.graph.input("cos", shape, ir.DataType.FLOAT)
        return cos, self.graph.input("sin", shape, ir.DataType.FLOAT)

    def _modulation_inputs(self, names: Sequence[str]) -> list[ir.Value]:
        shape = ("B", 1, self.dim)
        return [self.graph.input(name, shape, self.graph.high_precision) for name in names]

    def _linear(self, name: str, x: ir.Value, width: int) -> ir.Value:
        return linear(self.graph, name, x, ("B", "L", width))

    def _modulate(self, x: ir.Value, shift: ir.Value, scale: ir.Value) -> ir.Value:
        return modulate(self.graph, x, shift, scale)

    def _activation(self, x: ir.Value) -> ir.Value:
        op = self.graph.op
        if not self.config.gated_mlp:
            return op("Gelu", x, approximate="tanh")
        # Split for the same reason as for qkv; opset 23 has no Swish
        gate, value = self.graph.node("Split", (x,), 2, axis=2, num_outputs=2)
        return op("Mul", op("Mul", gate, op("Sigmoid", gate)), value)

    def _update(
        self, stream: str, x: ir.Value, attn: ir.Value, mods: Sequence[ir.Value]
    ) -> ir.Value:
        op = self.graph.op
        _, _, gate1, shift2, scale2, gate2 = mods
        attended = self._linear(f"{stream}_attn.proj", attn, self.dim)
        x = op("Add", x, op("Mul", gate1, attended))
        hidden = self._linear(f"{stream}_mlp.0", self._modulate(x, shift2, scale2), self.dim)
        update = self._linear(f"{stream}_mlp.2", self._activation(hidden), self.config.mlp_size)
        return op("Add", x, op("Mul", gate2, update))
