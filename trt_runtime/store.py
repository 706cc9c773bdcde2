"""Atomic files and the lock of an engine folder."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import DiskFullError, EngineBusyError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Full disk, full quota, and the largest file a file system (or a resource limit) allows."""

TEMPORARY_NAME = re.compile(r"\..+\.\d+\.tmp")
LOCK = "build.lock"
LOCK_POLL_SECONDS = 0.1


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write `data` so that `path` is either its old content or all of the new one.

    Raises:
        DiskFullError: the data did not fit; the temporary file is gone and `path` is as before.
    """
    view = memoryview(data)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(view)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in NO_SPACE:
            temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free
            raise DiskFullError(path, view.nbytes, free) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable; Windows has no such call and does not need it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Delete what killed writers left; call it only while holding the folder's lock."""
    for path in folder.iterdir():
        if TEMPORARY_NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of `folder`; `waiting` is called every 0.1 s while another process has it."""
    lock = FileLock(folder / LOCK)
    while True:
        try:
            lock.acquire(timeout=LOCK_POLL_SECONDS)
            break
        except Timeout:
            waiting()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def locked_at_once(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`.

    Raises:
        EngineBusyError: another process has it.
    """

    def refuse() -> None:
        raise EngineBusyError(folder)

    with locked(folder, refuse):
        yield


def is_locked(folder: Path) -> bool:
    """Tell whether a process is building in `folder`; False where no lock can be taken at all."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with locked_at_once(folder):
            return False
    except EngineBusyError:
        return True
    except OSError:
        # a read-only folder: nobody builds in it
        return False
