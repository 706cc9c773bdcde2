"""When a node has to run again because files changed on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
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


class OwnChanges:
    """Has a file that a node itself replaced count as unchanged for that node.

    ComfyUI asks for the fingerprint before the node runs. With the state of a file in it that the
    node replaces while it runs, the next run would find another fingerprint and do everything
    downstream again for nothing.
    """

    def __init__(self) -> None:
        self._changes: dict[tuple[str, Path], tuple[FileState, FileState]] = {}

    @contextlib.contextmanager
    def watched(self, node_id: str, path: Path) -> Iterator[None]:
        """Take what happens to a file in the block as done by a node of the graph."""
        counted = self.state(node_id, path)
        before = file_state(path)
        yield
        after = file_state(path)
        if after != before:
            self._changes[node_id, path] = (counted, after)

    def state(self, node_id: str, path: Path) -> FileState:
        """Return a file's state, or that before the node replaced it."""
        found = file_state(path)
        counted, replaced = self._changes.get((node_id, path), (found, found))
        return counted if found == replaced else found
