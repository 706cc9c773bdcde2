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
        """Return the entries of an earlier run of ``job``; a torn last line is dropped."""
        try:
            lines = self._path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError):
            return []
        if lines[0] != json.dumps({"job": job}):
            return []
        # a whole line ends with a newline, so the last piece is torn, or empty
        with contextlib.suppress(ValueError):
            self.entries.extend(json.loads(line) for line in lines[1:-1])
        self._rewrite(job)
        return self.entries

    def start(self, job: str) -> None:
        """Begin an empty journal."""
        self.entries = []
        self._rewrite(job)

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry and put it on disk."""
        self.entries.append(entry)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)
        self.entries = []

    def _rewrite(self, job: str) -> None:
        lines = [json.dumps(line) for line in ({"job": job}, *self.entries)]
        with self._path.open("w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
