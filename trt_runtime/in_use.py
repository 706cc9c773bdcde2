"""Marks on folders whose plans a process has open, so that no other process deletes them.

A mark is a lock on one of the files ``in_use-<number>.lock`` in the folder. The system lets go of
it when the process ends, however it ends, so nothing has to be cleaned up after a crash; and it
means the same on Windows and on network folders that know file locks. Many marks can be on one
folder, each on a file of its own: Windows has no shared lock for Python.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from filelock import FileLock, Timeout

from .store import is_held

logger = logging.getLogger(__name__)

MARK_NAME = re.compile(r"in_use-\d\d?\.lock")

_MARKS = 16
"""More engines than anyone has open at once; one more is protected by the marks of the others."""


class InUseMark:
    """Marks a folder until it is released, or until nothing refers to it any more.

    Args:
        folder: Of an engine or a bake; must exist. In a read-only folder there is no mark.
    """

    def __init__(self, folder: Path) -> None:
        self._lock: FileLock | None = None
        for number in range(_MARKS):
            # released by whichever thread drops the engine
            lock = FileLock(folder / f"in_use-{number}.lock", thread_local=False)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            except OSError as error:
                logger.debug("%s cannot be marked as in use: %s", folder.name, error)
                return
            self._lock = lock
            return

    def release(self) -> None:
        """Remove the mark; does nothing when there is none."""
        if self._lock is not None:
            self._lock.release()


def is_in_use(folder: Path) -> bool:
    """Tell whether a process, this one included, has marked a folder."""
    marks = (path for path in folder.iterdir() if MARK_NAME.fullmatch(path.name))
    return any(is_held(path) for path in marks)
