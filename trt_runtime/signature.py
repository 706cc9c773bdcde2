"""Reads a block's ONNX file without its weights and refuses what breaks the export contract."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .contract import (
    BLOCK_NAME,
    CONTRACT,
    HIGH_PRECISION,
    OUTPUTS,
    TensorSpec,
    block_names,
    has_factor_shape,
    has_possible_shape,
    input_names,
    is_plain,
)
from .errors.blocks import BlockContractError, BlocksMissingError, BlocksMixedError
from .external_data import ByteRange, weight_ranges

if TYPE_CHECKING:
    import onnx

MAX_ONNX_BYTES = 16 << 20
"""A block holds no weights (exports are below 300 KB); bounds what a hostile file costs."""

DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"


@dataclass(frozen=True)
class BlockSignature:
    """What a block's ONNX file promises."""

    path: Path
    block: str
    """Such as "double_blocks.0", or "double_blocks.0.lora" for a variant; the file's stem."""
    kind: str
    """"double" or "single"."""
    hidden_size: int
    num_heads: int
    high_precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fp4_linears: tuple[str, ...]
    """Linears that must become FP4 GEMMs."""
    fp8_linears: tuple[str, ...]
    """Linears that must become FP8 GEMMs; those in neither list are high precision."""
    fp8_attention: bool
    depth: int
    """Number of double blocks of the whole model."""
    depth_single_blocks: int
    checkpoint_digest: str
    recipe: str
    weights: Path | None
    """The safetensors file that holds the initializers."""
    ranges: tuple[ByteRange, ...]

    @property
    def weight_bytes(self) -> int:
        """Size of the initializers in that file."""
        return sum(entry.length for entry in self.ranges)


def read_signature(path: Path) -> BlockSignature:
    """Read and check one block file; its weights are located but not read.

    Raises:
        BlockContractError: the file is damaged, is not a block, or refers to data it must not.
    """
    model = _parsed(path)
    if not all(isinstance(text, str) for text in _texts(model)):
        raise BlockContractError(path, "it holds names that are not UTF-8")
    properties = {entry.key: entry.value for entry in model.metadata_props}
    reader = _Properties(path, properties)
    if reader.text("contract") != CONTRACT:
        raise BlockContractError(
            path, f"contract version '{reader.text('contract')}', this pack reads '{CONTRACT}'"
        )
    block, kind = reader.text("block"), reader.text("kind")
    match = BLOCK_NAME.fullmatch(block)
    if match is None or match[1] != kind or block != path.stem:
        raise BlockContractError(path, f"its metadata says block '{block}' of kind '{kind}'")
    high_precision = reader.text("high_precision")
    if high_precision not in HIGH_PRECISION:
        raise BlockContractError(path, f"high precision type '{high_precision}' is unknown")
    _check_nodes(path, model)
    fp4_linears, fp8_linears = reader.names("fp4_linears"), reader.names("fp8_linears")
    _check_linears(path, model, fp4_linears, fp8_linears)
    weights, ranges = weight_ranges(path, model)
    return BlockSignature(
        path=path,
        block=block,
        kind=kind,
        hidden_size=reader.number("hidden_size"),
        num_heads=reader.number("num_heads"),
        high_precision=high_precision,
        inputs=_specs(path, model.graph.input, input_names(block, kind)),
        outputs=_specs(path, model.graph.output, OUTPUTS[kind]),
        fp4_linears=fp4_linears,
        fp8_linears=fp8_linears,
        fp8_attention=reader.flag("fp8_attention"),
        depth=reader.number("depth"),
        depth_single_blocks=reader.number("depth_single_blocks"),
        checkpoint_digest=reader.text("checkpoint_digest"),
        recipe=reader.text("recipe"),
        weights=weights,
        ranges=ranges,
    )


def read_block_folder(folder: Path) -> tuple[BlockSignature, ...]:
    """Read all blocks of a model in the order they run; variants are not read.

    Raises:
        BlocksMissingError: a block of the model has no file.
        BlocksMixedError: the files come from different exports.
    """
    signatures = {}
    for path in sorted(folder.glob("*.onnx")):
        if BLOCK_NAME.fullmatch(path.stem) and is_plain(path.stem):
            signatures[path.stem] = read_signature(path)
    if not signatures:
        raise BlocksMissingError(folder, block_names(1, 0))
    first = next(iter(signatures.values()))
    names = block_names(first.depth, first.depth_single_blocks)
    missing = [name for name in names if name not in signatures]
    if missing:
        raise BlocksMissingError(folder, missing)
    extra = signatures.keys() - set(names)
    if extra:
        raise BlocksMixedError(
            folder, f"'{min(extra)}.onnx' is beyond the model's {len(names)} blocks"
        )
    for field in ("checkpoint_digest", "depth", "depth_single_blocks", "weights"):
        values = {getattr(signature, field) for signature in signatures.values()}
        if len(values) > 1:
            raise BlocksMixedError(folder, f"{len(values)} different values of '{field}'")
    return tuple(signatures[name] for name in names)


class _Properties:
    """Typed access to the flux_fp4.* metadata."""

    def __init__(self, path: Path, properties: dict[str, str]) -> None:
        self.path, self.properties = path, properties

    def text(self, key: str) -> str:
        value = self.properties.get(f"flux_fp4.{key}")
        if value is None:
            raise BlockContractError(self.path, f"metadata 'flux_fp4.{key}' is missing")
        return value

    def number(self, key: str) -> int:
        value = self.text(key)
        if not re.fullmatch(r"[0-9]{1,4}", value):
            raise BlockContractError(self.path, f"metadata 'flux_fp4.{key}' is not a number")
        return int(value)

    def flag(self, key: str) -> bool:
        value = self.text(key)
        if value not in ("0", "1"):
            raise BlockContractError(self.path, f"metadata 'flux_fp4.{key}' is not 0 or 1")
        return value == "1"

    def names(self, key: str) -> tuple[str, ...]:
        try:
            value = json.loads(self.text(key))
        except (ValueError, RecursionError) as error:
            raise BlockContractError(self.path, f"metadata 'flux_fp4.{key}' is not JSON") from error
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise BlockContractError(self.path, f"metadata 'flux_fp4.{key}' is not a list of names")
        return tuple(value)


def _parsed(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    size = path.stat().st_size
    if size > MAX_ONNX_BYTES:
        raise BlockContractError(path, f"it has {size} bytes, a block has at most {MAX_ONNX_BYTES}")
    try:
        return onnx.load_model_from_string(path.read_bytes())
    except DecodeError as error:
        raise BlockContractError(path, "it is damaged or not ONNX") from error


def _texts(model: onnx.ModelProto) -> Iterator[str | bytes]:
    """Yield every text that is looked at; protobuf gives what is not UTF-8 as bytes."""
    for prop in model.metadata_props:
        yield from (prop.key, prop.value)
    for tensor in model.graph.initializer:
        yield tensor.name
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)
    for value in (*model.graph.input, *model.graph.output):
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    for function in model.functions:
        yield from (function.domain, function.name)
    for node in (*model.graph.node, *(node for f in model.functions for node in f.node)):
        yield from (node.name, node.domain, node.op_type)


def _specs(
    path: Path, values: Iterable[onnx.ValueInfoProto], names: tuple[str, ...]
) -> tuple[TensorSpec, ...]:
    import onnx

    dtypes: dict[int, str] = {
        onnx.TensorProto.BFLOAT16: "bf16",
        onnx.TensorProto.FLOAT16: "fp16",
        onnx.TensorProto.FLOAT: "fp32",
    }
    specs = {}
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
        if tensor.elem_type not in dtypes:
            raise BlockContractError(path, f"'{value.name}' has an unexpected type")
        spec = TensorSpec(value.name, dtypes[tensor.elem_type], shape)
        if value.name in specs or not has_possible_shape(spec):
            found = reprlib.repr(shape)
            raise BlockContractError(path, f"'{value.name}' has an unexpected shape {found}")
        specs[value.name] = spec
    if specs.keys() != set(names):
        names_at = reprlib.repr(sorted(specs.keys() ^ set(names)))
        raise BlockContractError(path, f"inputs and outputs differ from the contract at {names_at}")
    wrong = [spec.name for spec in specs.values() if not has_factor_shape(spec)]
    if wrong:
        raise BlockContractError(path, f"'{wrong[0]}' has no shape of a low-rank factor")
    return tuple(specs.values())


def _check_linears(
    path: Path, model: onnx.ModelProto, fp4_linears: Sequence[str], fp8_linears: Sequence[str]
) -> None:
    """Refuse promises that differ from the stored weights: the lint relies on them."""
    import onnx

    for linears, kind, name in (
        (fp4_linears, onnx.TensorProto.FLOAT4E2M1, "fp4_linears"),
        (fp8_linears, onnx.TensorProto.FLOAT8E4M3FN, "fp8_linears"),
    ):
        stored = {
            tensor.name.removesuffix(".weight")
            for tensor in model.graph.initializer
            if tensor.name.endswith(".weight") and tensor.data_type == kind
        }
        if stored != set(linears):
            wrong = min(stored ^ set(linears))
            raise BlockContractError(
                path, f"metadata 'flux_fp4.{name}' and the stored weights differ at '{wrong}'"
            )


def _check_nodes(path: Path, model: onnx.ModelProto) -> None:
    """Allow standard operators and the one quantizer; no subgraphs, no external attributes."""
    import onnx

    functions = {(f.domain, f.name) for f in model.functions}
    if functions - {("trt", DYNAMIC_QUANTIZE)}:
        raise BlockContractError(path, f"it defines its own functions {sorted(functions)}")
    if model.graph.sparse_initializer:
        raise BlockContractError(path, "it has sparse weights")
    if model.training_info:
        raise BlockContractError(path, "it has graphs for training")
    if any(f.attribute_proto for f in model.functions):
        raise BlockContractError(path, "its functions have attributes of their own")
    nodes = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    for node in nodes:
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) != (
            "trt",
            DYNAMIC_QUANTIZE,
        ):
            raise BlockContractError(
                path, f"operator '{node.domain}::{node.op_type}' is not allowed"
            )
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise BlockContractError(path, f"node '{node.name}' has a subgraph")
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise BlockContractError(path, f"node '{node.name}' has a sparse tensor")
            tensors = [attribute.t, *attribute.tensors]
            if any(t.data_location == onnx.TensorProto.EXTERNAL for t in tensors):
                raise BlockContractError(path, f"node '{node.name}' refers to external data")
