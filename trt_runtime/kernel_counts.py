"""What a plan launches on the GPU, counted by kind from the builder's list of layers.

A row of that list is a kernel but for three types: ``signal`` and ``wait`` order two streams, and
``shape_call`` computes sizes on the host. Everything else is counted, also copies that a reshape
needs. What a row does is read from its operands' types, the ONNX nodes it covers and its name; the
format is the one that ``build_log`` is pinned to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .build_log import FP4, FP8, GEMM_TYPES, BuiltLayer

NOT_KERNELS = ("signal", "wait", "shape_call")

FP4_GEMM, FP8_GEMM, OTHER_GEMM = "FP4 GEMM", "FP8 GEMM", "other GEMM"
ATTENTION = "attention"
QUANTIZE = "quantize"
"""Writes FP4 codes, with their scales in the order that a GEMM reads, or in rows."""
SWIZZLE = "swizzle"
"""Brings the scales from rows into that order, where quantizing did not."""
NORM = "norm"
"""Has the sum of a LayerNorm or RMSNorm inside, and what was fused to it."""
ELEMENTWISE = "elementwise"
COPY = "copy"
"""Moves elements and computes nothing."""

KERNEL_KINDS = (
    FP4_GEMM,
    FP8_GEMM,
    OTHER_GEMM,
    ATTENTION,
    QUANTIZE,
    SWIZZLE,
    NORM,
    ELEMENTWISE,
    COPY,
)

_SUMS = ("LayerNormalization", "RMSNormalization", "ReduceMean")
"""ONNX nodes that need a sum; nodes without a name of their own are called by type and number."""

_GENERATED = re.compile(r"__myl_(?P<steps>[A-Za-z]+)_myl")
_STEP = re.compile(r"[A-Z][a-z]*")
_MOVES = frozenset(("Resh", "Tran", "Slic", "Conc", "Repl", "Move"))
"""Steps of a generated kernel by their names in its name: reshape, transpose, slice, concatenate,
replicate, move."""


def kernel_kind(layer: BuiltLayer) -> str:
    """Return one of ``KERNEL_KINDS``, or an empty text for a row that is no kernel."""
    if layer.type in NOT_KERNELS:
        return ""
    if layer.type in GEMM_TYPES:
        return {FP4: FP4_GEMM, FP8: FP8_GEMM}.get(layer.gemm_format, OTHER_GEMM)
    if "mha" in layer.name:
        return ATTENTION
    if FP4 in layer.outputs:
        return QUANTIZE
    tensors = {*layer.inputs, *layer.outputs} - {"Int64"}
    if tensors == {FP8} and any(node.endswith("/MatMul") for node in layer.onnx_nodes):
        return SWIZZLE
    if any(node.startswith(_SUMS) for node in layer.onnx_nodes):
        return NORM
    return COPY if _only_moves(layer.name) else ELEMENTWISE


def kernel_counts(layers: Iterable[BuiltLayer]) -> dict[str, int]:
    """Count a plan's kernels by kind; every kind is there, in the order of ``KERNEL_KINDS``."""
    kinds = [kernel_kind(layer) for layer in layers]
    return {kind: kinds.count(kind) for kind in KERNEL_KINDS}


def _only_moves(name: str) -> bool:
    generated = _GENERATED.match(name)
    return generated is not None and _MOVES.issuperset(_STEP.findall(generated["steps"]))
