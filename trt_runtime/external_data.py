"""Locates a block's weights: byte ranges of one plain file beside the ONNX file, nothing else."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .contract import MAX_DIMENSIONS
from .errors.blocks import BlockContractError

if TYPE_CHECKING:
    import onnx

MAX_NAME_BYTES = 255
"""Of a file name, on every usual file system; the system's answer to a longer one is an error."""

_KEYS = {"location", "offset", "length"}


@dataclass(frozen=True)
class ByteRange:
    """Where an initializer lies in the weights file."""

    name: str
    offset: int
    length: int


def weight_ranges(path: Path, model: onnx.ModelProto) -> tuple[Path | None, tuple[ByteRange, ...]]:
    """Return the weights file and the range of every external initializer of `model`.

    Raises:
        BlockContractError: data outside the folder, outside the file, or of another size than its
            shape.
    """
    import onnx

    tensors = [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    ranges, locations = [], set()
    for tensor, entries in zip(tensors, _external_entries(path, tensors), strict=True):
        locations.add(entries["location"])
        ranges.append(ByteRange(tensor.name, int(entries["offset"]), int(entries["length"])))
    if not locations:
        return None, ()
    if len(locations) > 1:
        raise BlockContractError(path, f"its weights lie in {len(locations)} files")
    weights = _weights_file(path, locations.pop())
    size = weights.stat().st_size
    for entry in ranges:
        if entry.offset + entry.length > size:
            raise BlockContractError(
                path,
                f"'{entry.name}' lies at {entry.offset}+{entry.length}, beyond the {size} bytes of "
                f"'{weights.name}'",
            )
    return weights, tuple(ranges)


def _external_entries(path: Path, tensors: list[onnx.TensorProto]) -> Iterator[dict[str, str]]:
    for tensor in tensors:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.keys() - _KEYS or len(entries) != len(tensor.external_data):
            # readers differ in which of two places counts, and one key moves the folder
            keys = reprlib.repr([entry.key for entry in tensor.external_data])
            raise BlockContractError(path, f"'{tensor.name}' says where it lies by {keys}")
        numbers = [entries.get(key, "") for key in ("offset", "length")]
        if not all(re.fullmatch(r"[0-9]{1,15}", number) for number in numbers):
            raise BlockContractError(path, f"'{tensor.name}' has no plain offset and length")
        expected = _byte_size(path, tensor)
        if int(numbers[1]) != expected:
            raise BlockContractError(
                path, f"'{tensor.name}' has {numbers[1]} bytes, its shape needs {expected}"
            )
        entries.setdefault("location", "")
        yield entries


def _byte_size(path: Path, tensor: onnx.TensorProto) -> int:
    dims = tuple(tensor.dims)
    if len(dims) > MAX_DIMENSIONS or not all(0 <= dim < 1 << 40 for dim in dims):
        raise BlockContractError(
            path, f"'{tensor.name}' has the impossible shape {reprlib.repr(dims)}"
        )
    return -(-math.prod(dims) * _bits(path, tensor) // 8)


def _bits(path: Path, tensor: onnx.TensorProto) -> int:
    import onnx

    kinds = onnx.TensorProto
    bits: dict[int, int] = {
        kinds.FLOAT4E2M1: 4,
        kinds.FLOAT8E4M3FN: 8,
        kinds.BFLOAT16: 16,
        kinds.FLOAT16: 16,
        kinds.FLOAT: 32,
    }
    if tensor.data_type not in bits:
        raise BlockContractError(path, f"weight '{tensor.name}' has an unexpected type")
    return bits[tensor.data_type]


def _weights_file(path: Path, location: str) -> Path:
    """Return the weights file, which must be a plain file beside the ONNX file."""
    is_path = re.search(r"[/\\:\x00]", location) is not None or location in ("", ".", "..")
    if is_path or len(location.encode()) > MAX_NAME_BYTES:
        raise BlockContractError(path, f"its weights lie outside its folder, at '{location}'")
    weights = path.parent / location
    if weights.is_symlink():
        raise BlockContractError(path, f"its weights file '{location}' is a link")
    if not weights.is_file():
        raise BlockContractError(path, f"its weights file '{location}' is missing")
    return weights
