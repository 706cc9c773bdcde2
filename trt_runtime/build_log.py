"""Lint of the builder's log: is every Linear a GEMM of its format, and attention an FP8 kernel?

TensorRT builds some FP4 and FP8 graphs without a word as high-precision GEMMs fed by a dequantized
weight.
The builder prints its layers through the documented ILogger when ProfilingVerbosity.DETAILED is
set, with operand types and the ONNX nodes of each layer. The text format is pinned by tests for
TensorRT-RTX 1.7; plan files are never read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors.build import EngineLintError

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
    outputs: tuple[str, ...] = ()
    """Data types of what it writes."""

    @property
    def gemm_format(self) -> str:
        """FP4 or FP8 for a GEMM both of whose matrices are of that type, else empty."""
        operands = [*self.inputs, *self.constants]
        if self.type not in GEMM_TYPES:
            return ""
        if FP4 in operands:
            # its scales are FP8 operands
            return FP4 if operands.count(FP4) >= 2 else ""
        return FP8 if operands.count(FP8) >= 2 else ""

    @property
    def is_fp8_attention(self) -> bool:
        """A fused attention whose q, k and v are FP8."""
        return "mha" in self.name and self.inputs.count(FP8) >= 3

    @property
    def unpacks_weight(self) -> bool:
        """A generated kernel that reads a quantized weight to write it in high precision."""
        return self.type not in GEMM_TYPES and (FP4 in self.constants or FP8 in self.constants)


@dataclass(frozen=True)
class LintCounts:
    """What was expected and found in one plan."""

    fp4_gemms_expected: int
    fp4_gemms_found: int
    fp8_gemms_expected: int
    fp8_gemms_found: int
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
    block: str,
    layers: Sequence[BuiltLayer],
    fp4_linears: Sequence[str],
    fp8_linears: Sequence[str],
    fp8_attention: bool,
) -> LintCounts:
    """Check a plan's layers against what its ONNX file promised.

    A Linear that is in neither list is high precision and may become any GEMM.

    Raises:
        EngineLintError: it names each Linear that is not a GEMM of its format, and "attention" for
            a lost FP8 kernel.
    """
    problems = {}
    for linears, expected in ((fp4_linears, FP4), (fp8_linears, FP8)):
        for linear in linears:
            problem = _problem_of_linear(linear, layers, expected)
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
    fp4, fp8 = len(fp4_linears), len(fp8_linears)
    return LintCounts(fp4, fp4, fp8, fp8, int(fp8_attention), found)


def _problem_of_linear(linear: str, layers: Sequence[BuiltLayer], expected: str) -> str:
    node = f"{linear}/MatMul"
    gemms = [layer for layer in layers if layer.type in GEMM_TYPES and node in layer.onnx_nodes]
    if not gemms:
        return "no GEMM was built for it"
    # the builder may split a Linear into several GEMMs: each must have the format
    wrong = next((gemm for gemm in gemms if gemm.gemm_format != expected), None)
    if wrong is None:
        return ""
    operands = " x ".join((*wrong.inputs[:1], *(wrong.constants or wrong.inputs[1:])[:1]))
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
        outputs=_datatypes(row, "Outputs"),
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
