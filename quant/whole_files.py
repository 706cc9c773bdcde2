"""Files that take their names only when they are whole, whatever happens to disk or process."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from .errors.files import DiskFullError, FileWriteError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Full disk, full quota, and the largest file a file system (or a resource limit) allows."""

TEMPORARY_END = r"-[0-9a-f]{32}\.tmp"
"""Regular expression for how the name of a file ends until the file is whole."""

_LOCK_POLL_SECONDS = 0.1

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def storing(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Tell what the system says against writing ``path`` as an error of this package.

    Args:
        path: The file.
        needed_bytes: Size of the whole file, if it is known.

    Raises:
        DiskFullError: The disk, the quota or the file system takes no more.
        FileWriteError: The system refuses for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            folder = next(folder for folder in path.parents if folder.exists())
            free = shutil.disk_usage(folder).free
            raise DiskFullError(path.name, needed_bytes, free) from error
        raise FileWriteError(path.name, path.parent.name, error.strerror or str(error)) from error


def make_folder(folder: Path) -> None:
    """Make a folder and those around it, as far as they are not there.

    Raises:
        DiskFullError, FileWriteError: The system refuses.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def whole_file(path: Path, needed_bytes: int = 0) -> Iterator[BinaryIO]:
    """Open a file that takes its name when the body has finished, and vanishes otherwise.

    Raises:
        DiskFullError, FileWriteError: The system refuses to write; ``path`` is as before.
    """
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.tmp")
    with storing(path, needed_bytes):
        try:
            with temporary.open("x+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable; Windows has no such call and does not need it."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def only_writer(lock: Path, folder: Path, stem: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold a lock on files of a folder, and delete what killed writers of them left there.

    Args:
        lock: The lock's file.
        folder: Where the files are.
        stem: Regular expression for the stems of the files.
        waiting: Called every 0.1 s while another process has the lock; may raise to cancel.

    Raises:
        DiskFullError, FileWriteError: The lock's file cannot be made.
    """
    held = FileLock(lock)
    while not _acquired(held):
        waiting()
    try:
        leftover = re.compile(rf"\.(?:{stem}){TEMPORARY_END}")
        for path in folder.iterdir():
            if leftover.fullmatch(path.name):
                _remove(path)
        yield
    finally:
        held.release()


def _acquired(lock: FileLock) -> bool:
    with storing(Path(lock.lock_file)):
        try:
            lock.acquire(timeout=_LOCK_POLL_SECONDS)
        except Timeout:
            return False
    return True


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("'%s' of an interrupted run stays: %s", path.name, error)
