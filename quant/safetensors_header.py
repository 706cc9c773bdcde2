"""The header of a safetensors file: where every tensor lies.

The file may come from anywhere, so nothing in it is believed before it is checked: the header's
length against the file and a limit before it is read, then every entry's types, shape and place.
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

MAX_HEADER_BYTES = 4 * 2**20
"""FLUX's own headers have 0.1 MB, all-in-one files with embedded thumbnails below 1 MB. Parsed JSON
takes up to 30 times its text: safetensors' own limit of 100 MB would let a file cost gigabytes."""

_MAX_DIMENSIONS = 8

_DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Bits of one element by safetensors 0.8's dtype codes (``tensor.rs::Dtype``)."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in the file.

    Attributes:
        dtype: safetensors dtype code: ``BF16``, ``F8_E4M3``, ``U8``, ...
        shape: As stored.
        offset: First byte, counted from the start of the file.
        length: Bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """Free-form metadata and the place of every tensor by name."""

    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check a header.

    Raises:
        SafetensorError: The file is damaged or is none; the text names the tensor.
        OSError: It cannot be read.
    """
    data_start, text = _header_text(path)
    entries = parse_json_object(text, "its header")
    metadata = entries.pop("__metadata__", {})
    if not _is_text_map(metadata):
        raise SafetensorError("its metadata is not a map of texts")
    tensors = {name: _stored_tensor(name, entry, data_start) for name, entry in entries.items()}
    _check_places(tensors, data_start, path.stat().st_size)
    # last word to the library that will read the tensors; in numpy's name it does not import torch
    with safe_open(path, framework="np"):
        pass
    return SafetensorsHeader(metadata, tensors)


def parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object that names nothing twice.

    Args:
        text: UTF-8.
        what: Subject for errors, for example ``its header``.

    Raises:
        SafetensorError: It is no JSON object or holds a name twice.
    """

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise SafetensorError(f"{what} holds {name[:200]!r} twice")
            found[name] = value
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        # no chain: the cause repeats megabytes of text
        raise SafetensorError(f"{what} is not JSON ({str(error)[:200]})") from None
    if not isinstance(value, dict):
        raise SafetensorError(f"{what} is not a JSON object")
    return value


def _header_text(path: Path) -> tuple[int, bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise SafetensorError(f"it has only {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise SafetensorError(
                f"its header claims {length} bytes and the file has {size}: it is cut short"
            )
        if length > MAX_HEADER_BYTES:
            raise SafetensorError(f"its header has {length} bytes, the limit is {MAX_HEADER_BYTES}")
        return 8 + length, file.read(length)


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _stored_tensor(name: str, entry: object, data_start: int) -> StoredTensor:
    subject = f"its tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise SafetensorError(f"{subject} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise SafetensorError(f"{subject} has the unknown dtype {reprlib.repr(dtype)}")
    if not _are_sizes(shape):
        raise SafetensorError(f"{subject} has the impossible shape {reprlib.repr(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SafetensorError(f"{subject} has the impossible place {reprlib.repr(offsets)}")
    begin, end = offsets
    bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise SafetensorError(
            f"{subject} is {dtype} of shape {shape}, which does not fit its {end - begin} bytes"
        )
    return StoredTensor(dtype, tuple(shape), data_start + begin, end - begin)


def _are_sizes(values: object) -> bool:
    # type, not isinstance: true and false are ints
    return (
        isinstance(values, list)
        and len(values) <= _MAX_DIMENSIONS
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _check_places(tensors: Mapping[str, StoredTensor], data_start: int, size: int) -> None:
    """Require tensors that fill the file without gap or overlap, as the format prescribes."""
    for name, place in tensors.items():
        if place.offset + place.length > size:
            raise SafetensorError(
                f"its tensor {name!r} ends at byte {place.offset + place.length} and the file has "
                f"{size}: it is cut short"
            )
    end, last = data_start, None
    for name, place in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].length)):
        if place.offset < end:
            raise SafetensorError(f"its tensors {last!r} and {name!r} overlap")
        if place.offset > end:
            raise SafetensorError(
                f"{place.offset - end} bytes before its tensor {name!r} are unused"
            )
        end, last = place.offset + place.length, name
    if end < size:
        raise SafetensorError(f"{size - end} bytes behind its last tensor are unused")
