"""When a node has to run again because files changed on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

FileState = tuple[int, int] | None


def file_state(path: Path) -> FileState:
    """Return modification time in ns and size in bytes, or None if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


@dataclass
class _Entry:
    files: dict[Path, FileState] = field(default_factory=dict)
    generation: int = 0


class OutputLedger:
    """Remembers the files that a node left behind.

    ComfyUI asks for the fingerprint before a node runs. A fingerprint of the node's own output
    files would differ after the first run, and everything downstream, sampling included, would run
    once more for nothing. So the ledger counts only changes that the node did not make itself:
    a file deleted, or replaced by another workflow.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def record(self, node_id: str, paths: Iterable[Path]) -> None:
        """Note the state in which a node of the graph leaves its files."""
        entry = self._entries.setdefault(node_id, _Entry())
        entry.files = {path: file_state(path) for path in paths}

    def fingerprint(self, node_id: str) -> int:
        """Return a number that changes when a node's files are no longer as it left them."""
        entry = self._entries.setdefault(node_id, _Entry())
        if any(file_state(path) != state for path, state in entry.files.items()):
            entry.files = {}
            entry.generation += 1
        return entry.generation
