"""A disk that fails at one chosen call: every call that writes below a folder is counted."""

from __future__ import annotations

import builtins
import io
import os
from pathlib import Path
from typing import Any

import pytest

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class FailingDisk:
    """Stands between the code and the system.

    Attributes:
        calls: What was called so far, in order.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        """Take over every way to write below a folder until `patch` is undone."""
        self._folder = str(folder)
        self.calls: list[str] = []
        self._failing, self._code = -1, 0
        self._open = io.open
        patch.setattr(io, "open", self._opened)
        patch.setattr(builtins, "open", self._opened)
        for name in ("replace", "rename", "mkdir", "truncate"):
            patch.setattr(os, name, self._counted(name, getattr(os, name)))
        os_open, fsync = os.open, os.fsync

        def counted_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & WRITING and self._is_mine(path):
                self.count(_label("os.open", path))
            return os_open(path, flags, *rest, **named)

        def counted_fsync(descriptor: int) -> None:
            self.count("fsync")
            fsync(descriptor)

        patch.setattr(os, "open", counted_open)
        patch.setattr(os, "fsync", counted_fsync)

    def fail(self, index: int, code: int) -> None:
        """Let the call of that index fail, counted from now."""
        self.calls.clear()
        self._failing, self._code = index, code

    def count(self, call: str) -> None:
        """Count a call, and fail if it is its turn."""
        self.calls.append(call)
        if len(self.calls) - 1 == self._failing:
            raise OSError(self._code, os.strerror(self._code), call)

    def _is_mine(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._folder)

    def _counted(self, name: str, function: Any) -> Any:
        def counted(path: Any, *rest: Any, **named: Any) -> Any:
            if self._is_mine(path):
                self.count(f"{name} {Path(path).name}")
            return function(path, *rest, **named)

        return counted

    def _opened(self, path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if not (set(mode) & set("wax+") and self._is_mine(path)):
            return self._open(path, mode, *rest, **named)
        self.count(_label("open", path))
        return WrittenFile(self._open(path, mode, *rest, **named), self)


def _label(call: str, path: Any) -> str:
    # Linux makes files without a name by opening their folder; tempfile has another way as well
    return f"{'probe' if Path(path).is_dir() else call} {Path(path).name}"


class WrittenFile:
    """A file whose writes are counted."""

    def __init__(self, file: Any, disk: FailingDisk) -> None:
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> WrittenFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._disk.count(f"write {Path(self._file.name).name}")
        return self._file.write(data)

    def flush(self) -> None:
        self._disk.count(f"flush {Path(self._file.name).name}")
        self._file.flush()
