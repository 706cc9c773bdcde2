"""Authoring an ONNX graph whose weights are byte ranges of the quantized checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..emulation import attention_root_scale
from ..quantized_checkpoint import QuantizedCheckpoint
from ..recipe import Format
from ..safetensors_header import StoredTensor
from .contract import PLAIN, Variant

OPSET = 23
"""First opset with FLOAT4E2M1 blocks in DequantizeLinear, RMSNormalization, RotaryEmbedding."""

IR_VERSION = 11
"""The ONNX IR version that belongs to opset 23."""

TRT_DOMAIN = "trt"

_STORED_TYPES = {
    "U8": ir.DataType.FLOAT4E2M1,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
    "F32": ir.DataType.FLOAT,
    "BF16": ir.DataType.BFLOAT16,
    "F16": ir.DataType.FLOAT16,
}
_HIGH_PRECISION = {
    "bf16": (ir.DataType.BFLOAT16, ml_dtypes.bfloat16),
    "fp16": (ir.DataType.FLOAT16, np.float16),
    "fp32": (ir.DataType.FLOAT, np.float32),
}


class BlockGraph:
    """A graph under construction for one block, or for what surrounds the blocks.

    Attributes:
        high_precision: ONNX type of everything that is not quantized.
        hidden_size: Width of a token.
        variant: What it takes besides the inputs that every block has.
    """

    def __init__(
        self, checkpoint: QuantizedCheckpoint, block: str | None, variant: Variant = PLAIN
    ) -> None:
        """Begin an empty graph.

        Args:
            checkpoint: Header of the quantized checkpoint.
            block: Tensors are named relative to it; None: by their full names.
            variant: What the graph takes besides.
        """
        self._checkpoint = checkpoint
        self.variant = variant
        self._name = block or "transformer"
        self._prefix = f"{block}." if block else ""
        self.hidden_size = checkpoint.metadata.config.hidden_size
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self.high_precision, self._numpy_type = _HIGH_PRECISION[checkpoint.metadata.high_precision]

    def input(self, name: str, shape: tuple[int | str, ...], dtype: ir.DataType) -> ir.Value:
        """Add a graph input; strings in ``shape`` are dynamic axes."""
        value = ir.val(name, dtype, shape)
        self._inputs.append(value)
        return value

    def op(
        self,
        op_type: str,
        *inputs: ir.Value,
        name: str | None = None,
        **attributes: int | float | str | list[int],
    ) -> ir.Value:
        """Add a node with one output and return that; the node names its output."""
        return self.node(op_type, inputs, 1, name, "", **attributes)[0]

    def node(
        self,
        op_type: str,
        inputs: tuple[ir.Value, ...],
        outputs: int,
        name: str | None = None,
        domain: str = "",
        **attributes: int | float | str | list[int],
    ) -> tuple[ir.Value, ...]:
        """Add a node and return its outputs."""
        name = name or f"{op_type}_{len(self._nodes)}"
        node = ir.node(
            op_type, inputs, attributes or None, domain=domain, num_outputs=outputs, name=name
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{name}:{index}"
        self._nodes.append(node)
        return tuple(node.outputs)

    def stored(self, tensor: str) -> ir.Value:
        """Return a tensor as an initializer that points into the checkpoint.

        Args:
            tensor: Name relative to the block. Packed FP4 weights appear with their ``[N, K]``.
        """
        if tensor not in self._initializers:
            place = self._checkpoint.tensors[self._prefix + tensor]
            dtype, shape = _STORED_TYPES[place.dtype], _logical_shape(place)
            external = ir.ExternalTensor(
                self._checkpoint.path.name,
                place.offset,
                place.length,
                dtype,
                shape=ir.Shape(shape),
                name=tensor,
                base_dir=self._checkpoint.path.parent,
            )
            self._initializers[tensor] = ir.val(tensor, dtype, shape, const_value=external)
        return self._initializers[tensor]

    def has(self, tensor: str) -> bool:
        """Tell whether the checkpoint stores this tensor."""
        return self._prefix + tensor in self._checkpoint.tensors

    def linear_format(self, linear: str) -> Format:
        """Tell the format in which a Linear is stored."""
        return self._checkpoint.linear_format(self._prefix + linear)

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """Return ``(N, K)`` of a Linear's weight."""
        return self._checkpoint.linear_shape(self._prefix + linear)

    def constant(self, name: str, value: float | np.ndarray) -> ir.Value:
        """Return a constant in the high-precision type; one initializer per name."""
        return self._constant(name, np.asarray(value, dtype=self._numpy_type))

    def fp32_constant(self, name: str, value: float | np.ndarray) -> ir.Value:
        """Return a constant that bf16 would be too coarse for; one initializer per name."""
        return self._constant(name, np.asarray(value, np.float32))

    def integers(self, *values: int) -> ir.Value:
        """Return a 1-D int64 constant."""
        return self._constant("int64_" + "_".join(map(str, values)), np.array(values, np.int64))

    def attention_root_scale(self, head_dim: int) -> ir.Value:
        """Return ``head_dim ** -0.25`` in fp32; in bf16 all attention scores were 0.3 % small."""
        return self.fp32_constant("attention_root_scale", attention_root_scale(head_dim))

    def fp8_zero(self) -> ir.Value:
        """Return the E4M3 zero point that makes QuantizeLinear produce E4M3."""
        return self._constant("fp8_zero", np.zeros((), ml_dtypes.float8_e4m3fn))

    def inline(self, graph: ir.Graph, inputs: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
        """Append another graph's nodes.

        Args:
            graph: A finished block. Its nodes and values take its name as prefix; weights keep
                their place in the checkpoint, constants of equal name are shared.
            inputs: Value for every input of ``graph``, by the input's name.

        Returns:
            The outputs of ``graph`` by their names.
        """
        values = {value: inputs[str(value.name)] for value in graph.inputs}
        for name, value in graph.initializers.items():
            values[value] = self._adopted(f"{graph.name}.{name}", name, value)
        for node in graph:
            copy = ir.Node(
                node.domain,
                node.op_type,
                [None if value is None else values[value] for value in node.inputs],
                node.attributes.values(),
                num_outputs=len(node.outputs),
                name=f"{graph.name}/{node.name}",
            )
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name, new.type, new.shape = f"{graph.name}/{old.name}", old.type, old.shape
                values[old] = new
            self._nodes.append(copy)
        return {str(value.name): values[value] for value in graph.outputs}

    def model(self, outputs: dict[str, ir.Value], metadata: dict[str, str]) -> ir.Model:
        """Finish the graph.

        Args:
            outputs: Value by output name; axes are inferred by readers.
            metadata: ``metadata_props`` of the model.
        """
        named = []
        for name, value in outputs.items():
            output = self.op("Identity", value, name=name)
            output.name, output.type, output.shape = name, value.type, value.shape
            named.append(output)
        graph = ir.Graph(
            self._inputs,
            named,
            nodes=self._nodes,
            initializers=tuple(self._initializers.values()),
            opset_imports={"": OPSET, TRT_DOMAIN: 1},
            name=self._name,
        )
        return ir.Model(
            graph, ir_version=IR_VERSION, producer_name="flux_fp4", metadata_props=metadata
        )

    def _adopted(self, stored_name: str, constant_name: str, value: ir.Value) -> ir.Value:
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            assert tensor is not None
            return self._constant(constant_name, tensor.numpy())
        twin = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=stored_name,
            base_dir=tensor.base_dir,
        )
        adopted = ir.val(stored_name, tensor.dtype, tensor.shape, const_value=twin)
        self._initializers[stored_name] = adopted
        return adopted

    def _constant(self, name: str, value: np.ndarray) -> ir.Value:
        if name not in self._initializers:
            tensor = ir.tensor(value, name=name)
            self._initializers[name] = ir.val(name, tensor.dtype, value.shape, const_value=tensor)
        return self._initializers[name]


def _logical_shape(place: StoredTensor) -> tuple[int, ...]:
    if place.dtype == "U8":
        rows, packed_columns = place.shape
        return rows, 2 * packed_columns
    return place.shape
