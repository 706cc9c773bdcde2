"""A list of finished parts on disk that survives a crash at any moment."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """JSON lines: the job's name first, then one entry per finished part.

    Attributes:
        entries: What the file holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: list[dict[str, Any]] = []

    def read(self, job: str) -> list[dict[str, Any]]:
        """Return the entries of an earlier run of ``job``; a torn last line is cut off."""
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except OSError:
            return []
        if not lines or lines[0] != _line({"job": job}):
            return []
        whole = len(lines[0])
        with contextlib.suppress(ValueError):
            for line in lines[1:]:
                # a line without its end may still read as a shorter number or name
                if not line.endswith(b"\n"):
                    break
                self.entries.append(json.loads(line))
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
    return json.dumps(entry).encode() + b"\n"
