"""Atomic files and the lock of an engine folder."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors.storage import DiskFullError, EngineBusyError, FileWriteError

logger = logging.getLogger(__name__)

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Full disk, full quota, and the largest file a file system (or a resource limit) allows."""

TEMPORARY_NAME = re.compile(r"\..+\.\d+\.tmp")
LOCK = "build.lock"
LOCK_POLL_SECONDS = 0.1


@contextlib.contextmanager
def storing(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Tell what the system says against writing `path` as an error of this package.

    Raises:
        DiskFullError: The disk, the quota or the file system takes no more.
        FileWriteError: The system refuses for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            free = shutil.disk_usage(path.parent).free
            raise DiskFullError(path, needed_bytes, free) from error
        raise FileWriteError(path, error.strerror or str(error)) from error


def make_folder(folder: Path) -> None:
    """Make a folder in one that exists, if it is not there.

    Raises:
        StorageError: The system refuses.
    """
    with storing(folder):
        folder.mkdir(exist_ok=True)


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write `data` so that `path` is either its old content or all of the new one.

    Raises:
        StorageError: The data could not be written; the temporary file is gone.
    """
    view = memoryview(data)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storing(path, view.nbytes):
        try:
            with temporary.open("wb") as file:
                file.write(view)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
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
            remove(path)


def remove(path: Path) -> None:
    """Delete a file that nothing refers to; one that cannot be deleted now is left with a warning.

    Windows refuses to delete a plan that an engine in memory still maps.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("'%s' is no longer needed, but stays: %s", path.name, error)


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of `folder`; temporary files of killed writers are gone before and after.

    Args:
        folder: Must exist.
        waiting: Called every 0.1 s while another process has the lock; may raise to cancel.

    Raises:
        StorageError: The lock file cannot be made.
    """
    lock = FileLock(folder / LOCK)
    while not _acquired(lock):
        waiting()
    try:
        remove_temporaries(folder)
        yield
    finally:
        try:
            # a cancel kills workers amid a write
            remove_temporaries(folder)
        finally:
            lock.release()


def _acquired(lock: FileLock) -> bool:
    with storing(Path(lock.lock_file)):
        try:
            lock.acquire(timeout=LOCK_POLL_SECONDS)
        except Timeout:
            return False
    return True


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
    # not `locked`: that cleans the folder up, and to look must change nothing
    return (folder / LOCK).is_file() and is_held(folder / LOCK)


def is_held(path: Path) -> bool:
    """Tell whether a process, this one included, has the lock of an existing file."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        # a read-only folder: nobody works in it
        return False
    lock.release()
    return False
