"""TensorRT-RTX's compiled kernels on disk: only the first load on a machine compiles them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .digest import digest_of_bytes
from .errors.storage import StorageError
from .store import write_atomic

logger = logging.getLogger(__name__)

FILE_NAME = "runtime-{}.cache"
CACHE_NAME = re.compile(r"runtime-[0-9a-f]{8}\.cache")
MAGIC = b"FLUXFP4 runtime cache 1\n"
MAX_CACHE_BYTES = 4 << 30
MAX_OWNER_BYTES = 4096
OWNER_DIGITS = 8


def cache_name(owner: str) -> str:
    """Return the file name of an owner's cache: owners that take turns keep their kernels."""
    return FILE_NAME.format(digest_of_bytes(owner.encode())[:OWNER_DIGITS])


def cache_owner(path: Path) -> str | None:
    """Return whose kernels a cache file says it holds; None if that cannot be read from it."""
    try:
        with path.open("rb") as file:
            magic, header = file.readline(len(MAGIC)), file.readline(MAX_OWNER_BYTES)
        fields = json.loads(header)
    except (OSError, ValueError, RecursionError):
        return None
    owner = fields.get("owner") if magic == MAGIC and isinstance(fields, dict) else None
    return owner if isinstance(owner, str) else None


class RuntimeCache:
    """One cache shared by all contexts of an engine.

    The file is MAGIC, one JSON line with owner and digest, and TensorRT's own bytes. TensorRT
    checks them against library, driver and GPU; the digest keeps damaged bytes away from it.

    Args:
        path: The file.
        owner: Library version, GPU and driver; a cache of another owner is not used.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self.path, self.owner = path, owner
        self._cache: Any = None

    def attach(self, config: Any) -> None:
        """Make an IRuntimeConfig use this cache; the first call reads the file."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            blob = self._stored()
            if blob is not None and not self._cache.deserialize(blob):
                logger.info(
                    "Kernels in %s are for another driver or GPU; compiling", self.path.name
                )
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the kernels compiled so far; a failure only costs time at the next start."""
        if self._cache is None:
            return
        blob = bytes(memoryview(self._cache.serialize()))
        header = json.dumps({"owner": self.owner, "digest": digest_of_bytes(blob)})
        try:
            # another process that saves has compiled the same kernels
            with FileLock(self.path.with_suffix(".lock"), timeout=0):
                write_atomic(self.path, MAGIC + header.encode() + b"\n" + blob)
        except Timeout:
            logger.debug("%s is being written by another process", self.path.name)
        except (OSError, StorageError) as error:
            logger.warning("Compiled kernels were not stored: %s", error)

    def close(self) -> None:
        """Release the native object."""
        self._cache = None

    def _stored(self) -> bytes | None:
        if not self.path.is_file():
            return None
        if self.path.stat().st_size > MAX_CACHE_BYTES:
            logger.warning("%s is not used: it is larger than any cache", self.path.name)
            return None
        magic, _, rest = self.path.read_bytes().partition(b"\n")
        header, _, blob = rest.partition(b"\n")
        problem = self._problem(magic + b"\n", header, blob)
        if problem:
            logger.warning(
                "%s is not used, kernels are compiled again: %s", self.path.name, problem
            )
            return None
        return blob

    def _problem(self, magic: bytes, header: bytes, blob: bytes) -> str:
        if magic != MAGIC:
            return "it is not a cache of this version"
        try:
            fields = json.loads(header)
        except (ValueError, RecursionError):
            return "its header is damaged"
        if not isinstance(fields, dict) or fields.get("digest") != digest_of_bytes(blob):
            return "it is damaged"
        if fields.get("owner") != self.owner:
            return f"it belongs to {fields.get('owner')}, this is {self.owner}"
        return ""
