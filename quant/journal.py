"""A list of finished parts on disk that survives a crash at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from blake3 import blake3


class Journal:
    """Lines of a digest and JSON: the job's name first, then one entry per finished part.

    Attributes:
        entries: What the file holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: list[dict[str, Any]] = []

    def read(self, job: str) -> list[dict[str, Any]]:
        """Return the entries of an earlier run of ``job``; what follows damage is cut off."""
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except OSError:
            return []
        if not lines or lines[0] != _line({"job": job}):
            return []
        whole = len(lines[0])
        for line in lines[1:]:
            digest, _, text = line.partition(b" ")
            # a line without its end may still read as a shorter number or name
            if not line.endswith(b"\n") or digest != _digest(text):
                break
            self.entries.append(json.loads(text))
            whole += len(line)
        # cut, not written anew: a crash right here must not lose the entries
        os.truncate(self._path, whole)
        return self.entries

    def start(self, job: str) -> None:
        """Begin an empty journal."""
        self.entries = []
        self._write("wb", {"job": job})

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry and put it on disk."""
        self.entries.append(entry)
        self._write("ab", entry)

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)
        self.entries = []

    def _write(self, mode: str, entry: dict[str, Any]) -> None:
        with self._path.open(mode) as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry).encode() + b"\n"
    return _digest(text) + b" " + text


def _digest(text: bytes) -> bytes:
    return blake3(text).hexdigest(length=16).encode()
