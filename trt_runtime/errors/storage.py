"""Errors about writing files."""

from __future__ import annotations

from pathlib import Path

from . import EngineError


class StorageError(EngineError):
    """A file could not be written; nothing incomplete with its final name was left."""


class DiskFullError(StorageError):
    """A file did not fit.

    Attributes:
        path: The file.
        needed_bytes: Its size; 0 where it is not known.
        free_bytes: What the disk has left.
    """

    def __init__(self, path: Path, needed_bytes: int, free_bytes: int) -> None:
        self.path, self.needed_bytes, self.free_bytes = path, needed_bytes, free_bytes
        needs = f"needs {size_text(needed_bytes)}, but" if needed_bytes else "does not fit:"
        # a quota or a limit of the file system refuses long before the disk is full
        super().__init__(
            f"'{path.name}' {needs} its disk takes no more ({size_text(free_bytes)} free in "
            f"'{path.parent.name}'). Free some space and queue again; finished blocks are kept."
        )


class FileWriteError(StorageError):
    """The system refused to write for another reason than a full disk."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(
            f"'{path.name}' cannot be written into the folder '{path.parent.name}': {reason}. "
            "Check that ComfyUI may write there and that the disk is in order, then queue again; "
            "finished blocks are kept."
        )


class EngineBusyError(EngineError):
    """Another process is building in a folder that was to be changed."""

    state, remedy = "is being built by another process", "wait until that is done"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(
            f"'{folder.parent.name}/{folder.name}' {self.state}. Nothing was changed; "
            f"{self.remedy} and queue again."
        )


class EngineInUseError(EngineBusyError):
    """A process has an engine or a bake open that was to be deleted."""

    state = "is open in a running ComfyUI"
    remedy = "press 'Free model and node cache' there, or close it,"


def size_text(size: int) -> str:
    """Return a size in bytes as a person reads it."""
    if size >= 10**9:
        return f"{size / 1e9:,.1f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 10**6 else f"{size / 1e3:.1f} kB"
