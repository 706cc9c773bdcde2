"""The header of a safetensors file: where every tensor lies."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open


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
    """Read a header after safetensors itself has checked sizes, offsets and file length.

    Raises:
        SafetensorError: The file is damaged or is none.
        OSError: It cannot be read.
    """
    with safe_open(path, framework="pt"):
        pass
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    metadata = entries.pop("__metadata__", {})
    data_start = 8 + length
    tensors = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        tensors[name] = StoredTensor(
            entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin
        )
    return SafetensorsHeader(metadata, tensors)
