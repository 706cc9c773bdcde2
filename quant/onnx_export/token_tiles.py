"""Token axes padded to whole tiles of rows, so that quantizing for an FP4 GEMM is one kernel."""

from __future__ import annotations

import onnx_ir as ir

from .graph import BlockGraph

ROWS_PER_TILE = 128
"""Rows in a tile of the block scales that an FP4 GEMM reads (the builder's log of TensorRT-RTX
1.7.1: scales ``[M / 128, 4, 32, K / 64, 4]``). Where the builder can prove that M is a multiple of
it, one kernel quantizes and writes this layout; else a second one pads and reorders the scales."""


class TokenTiles:
    """The tokens of one stream, with and without padding. Padding rows are zeros.

    Every row but those of attention depends on itself alone, so padding changes no other row; it
    must be cut before attention, where it would be seen.

    Attributes:
        tokens: Their number, int64 ``[1]``.
    """

    def __init__(self, graph: BlockGraph, x: ir.Value, tiled: bool) -> None:
        """Measure a stream.

        Args:
            graph: The block's graph.
            x: The stream, ``[B, L, D]``.
            tiled: Whether to pad at all; without, nothing here emits a node that matters.
        """
        self._graph, self._tiled = graph, tiled
        self.tokens = graph.op("Shape", x, start=1, end=2)
        if not tiled:
            return
        op, tile = graph.op, graph.integers(ROWS_PER_TILE)
        # said as a product: from the remainder of a division the builder cannot prove the multiple
        tiles = op("Div", op("Add", self.tokens, graph.integers(ROWS_PER_TILE - 1)), tile)
        self._rows = op("Mul", tiles, tile)
        self._missing = op("Sub", self._rows, self.tokens)

    def pad(self, x: ir.Value) -> ir.Value:
        """Pad ``x [B, L, D]`` to ``[B, rows, D]``."""
        if not self._tiled:
            return x
        return self._padded(x, axis=1, rank=3)

    def merged_heads(self, x: ir.Value) -> ir.Value:
        """Pad and merge heads: ``x [B, heads, L, head_dim]`` to ``[B, rows, D]``."""
        graph = self._graph
        if self._tiled:
            # padded with its heads apart: padded as `pad` does, the builder shares one tensor of
            # zeros with it, as large as all tokens, and keeps that alive along the block
            x = self._padded(x, axis=2, rank=4)
        x = graph.op("Transpose", x, perm=[0, 2, 1, 3])
        rows = self._rows if self._tiled else graph.integers(0)
        # the rows by their number: the builder does not know those of a slice to be as many
        sizes = graph.integers(0), rows, graph.integers(graph.hidden_size)
        return graph.op("Reshape", x, graph.op("Concat", *sizes, axis=0))

    def cut(self, x: ir.Value) -> ir.Value:
        """Cut ``x [B, rows, D]`` back to ``[B, L, D]``."""
        if not self._tiled:
            return x
        graph = self._graph
        return graph.op("Slice", x, graph.integers(0), self.tokens, graph.integers(1))

    def _padded(self, x: ir.Value, axis: int, rank: int) -> ir.Value:
        zeros = self._graph.integers(0)
        after = [self._missing if index == axis else zeros for index in range(rank)]
        return self._graph.op("Pad", x, self._graph.op("Concat", *[zeros] * rank, *after, axis=0))
