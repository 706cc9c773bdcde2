"""Lint of the builder's log: did every Linear become an FP4 GEMM and the attention an FP8 kernel?

TensorRT builds some FP4 graphs without a word as high-precision GEMMs fed by a dequantized weight.
The builder prints its layers through the documented ILogger when ProfilingVerbosity.DETAILED is
set, with operand types and the ONNX nodes of each layer. The text format is pinned by tests for
TensorRT-RTX 1.7; plan files are never read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import EngineLintError

LAYERS_HEADER = "Layers:"
ACTIVATION_MEMORY = re.compile(r"Total Activation Memory: (\d+) bytes")
ROW = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), ")
ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
DATATYPE = re.compile(r"Datatype: (\w+)")
GEMM_TYPES = ("gemm", "fully_connected", "runtime_fusion")
FP4, FP8 = "FP4E2M1", "FP8"
ATTENTION = "attention"
"""Key under which a lost FP8 attention is reported; the other keys are Linears."""


@dataclass(frozen=True)
class BuiltLayer:
    """One row of the builder's layer list."""

    name: str
    type: str
    inputs: tuple[str, ...]
    """Data types of the runtime operands."""
    constants: tuple[str, ...]
    """Data types of the weights."""
    onnx_nodes: tuple[str, ...]

    @property
    def is_fp4_gemm(self) -> bool:
        """Both matrices are FP4; their scales are FP8 operands."""
        return self.type in GEMM_TYPES and [*self.inputs, *self.constants].count(FP4) >= 2

    @property
    def is_fp8_attention(self) -> bool:
        """A fused attention whose q, k and v are FP8."""
        return "mha" in self.name and self.inputs.count(FP8) >= 3

    @property
    def unpacks_weight(self) -> bool:
        """A generated kernel that reads an FP4 weight only to write it in high precision."""
        return self.type not in GEMM_TYPES and FP4 in self.constants


@dataclass(frozen=True)
class LintCounts:
    """What was expected and found in one plan."""

    fp4_gemms_expected: int
    fp4_gemms_found: int
    fp8_mha_expected: int
    fp8_mha_found: int


def layers_from_log(messages: Iterable[str]) -> tuple[BuiltLayer, ...]:
    """Return the layers that a verbose builder log lists."""
    layers = []
    for message in messages:
        if message.startswith(LAYERS_HEADER):
            rows = (_layer(row) for row in message.splitlines())
            layers += [layer for layer in rows if layer is not None]
    return tuple(layers)


def activation_bytes(messages: Iterable[str]) -> int:
    """Return the activation memory that the builder reports for the profile's maximum."""
    sizes = [match for message in messages if (match := ACTIVATION_MEMORY.match(message))]
    return max((int(match[1]) for match in sizes), default=0)


def lint_build(
    block: str, layers: Sequence[BuiltLayer], fp4_linears: Sequence[str], fp8_attention: bool
) -> LintCounts:
    """Check a plan's layers against what its ONNX file promised.

    Raises:
        EngineLintError: it names each Linear that is not an FP4 GEMM, and "attention" for a lost
            FP8 kernel.
    """
    problems = {}
    for linear in fp4_linears:
        problem = _problem_of_linear(linear, layers)
        if problem:
            problems[linear] = problem
    for layer in layers:
        for linear in _unpacked_linears(layer):
            problems.setdefault(linear, "its weight is dequantized by a separate kernel")
    found = sum(layer.is_fp8_attention for layer in layers)
    if found != int(fp8_attention):
        problems[ATTENTION] = f"{found} fused FP8 kernels, expected {int(fp8_attention)}"
    if problems:
        if not layers:
            problems = {"log": "the builder printed no layer list, so nothing can be checked"}
        raise EngineLintError(block, problems)
    gemms = len(fp4_linears)
    return LintCounts(gemms, gemms, int(fp8_attention), found)


def _problem_of_linear(linear: str, layers: Sequence[BuiltLayer]) -> str:
    node = f"{linear}/MatMul"
    mine = [layer for layer in layers if node in layer.onnx_nodes]
    if any(layer.is_fp4_gemm for layer in mine):
        return ""
    gemm = next((layer for layer in mine if layer.type in GEMM_TYPES), None)
    if gemm is None:
        return "no GEMM was built for it"
    operands = " x ".join((*gemm.inputs[:1], *(gemm.constants or gemm.inputs[1:])[:1]))
    return f"runs as a {operands} GEMM"


def _unpacked_linears(layer: BuiltLayer) -> list[str]:
    if not layer.unpacks_weight:
        return []
    suffix = "/DQ_weight"
    names = [n.removesuffix(suffix) for n in layer.onnx_nodes if n.endswith(suffix)]
    return names or [layer.name]


def _layer(row: str) -> BuiltLayer | None:
    head = ROW.match(row)
    if head is None:
        return None
    return BuiltLayer(
        name=head["name"],
        type=head["type"],
        inputs=_datatypes(row, "Inputs"),
        constants=_datatypes(row, "Constants"),
        onnx_nodes=tuple(ONNX_NODE.findall(row)),
    )


def _datatypes(row: str, section: str) -> tuple[str, ...]:
    """Return the data types inside ", <section>: [ ... ]", whose brackets nest."""
    marker = f", {section}: ["
    start = row.find(marker)
    if start < 0:
        return ()
    start, depth = start + len(marker), 1
    for end in range(start, len(row)):
        depth += (row[end] == "[") - (row[end] == "]")
        if depth == 0:
            return tuple(DATATYPE.findall(row[start:end]))
    return ()
