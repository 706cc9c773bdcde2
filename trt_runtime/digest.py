"""Digests that name plans: blake3, hexadecimal."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blake3 import blake3

READ_BYTES = 8 << 20


def digest_of_bytes(data: bytes | memoryview | mmap.mmap) -> str:
    """Return the digest of bytes in memory."""
    return blake3(data, max_threads=blake3.AUTO).hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the digest of a whole file."""
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return hasher.hexdigest()


def digest_of_ranges(path: Path, ranges: Iterable[tuple[int, int]]) -> str:
    """Return the digest of byte ranges (offset, length) of a file, in the given order."""
    hasher = blake3(max_threads=blake3.AUTO)
    with path.open("rb") as file:
        for offset, length in ranges:
            hasher.update(f"{length}:".encode())
            file.seek(offset)
            while length > 0:
                chunk = file.read(min(length, READ_BYTES))
                if not chunk:
                    break
                hasher.update(chunk)
                length -= len(chunk)
    return hasher.hexdigest()


def digest_of_fields(fields: dict[str, Any]) -> str:
    """Return the digest of a JSON-compatible dictionary, independent of its order."""
    return digest_of_bytes(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
