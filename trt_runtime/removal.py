"""Deleting engines and bakes: only files that this pack makes, by name, and never through a link.

What a user put beside the plans stays, and so does the folder then.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from .bakes import BLOCKS, MANIFESTS
from .contract import BLOCK_NAME
from .errors.storage import EngineInUseError
from .in_use import MARK_NAME, is_in_use
from .last_use import LAST_USED, last_used
from .manifest import PLAN_NAME
from .self_test_record import RECORD, REPORT
from .store import LOCK, TEMPORARY_NAME, locked_at_once

logger = logging.getLogger(__name__)

_ENGINE_FILES = {*MANIFESTS, RECORD, REPORT, LAST_USED}
_CACHE = re.compile(r"runtime-[0-9a-f]{8}\.(cache|lock)")
_BAKE_FILES = {LAST_USED, ".blocks.partial", ".blocks.journal", ".blocks.lock", ".onnx.lock"}
_ONNX = re.compile(rf"{BLOCK_NAME.pattern}\.onnx|\.{BLOCK_NAME.pattern}-[0-9a-f]{{32}}\.tmp")


def engine_files(engine_dir: Path) -> list[Path]:
    """List the files of an engine, or of the plans of a bake; manifests come first."""
    patterns = (PLAN_NAME, _CACHE, TEMPORARY_NAME, MARK_NAME)
    found = [
        path
        for path in _own_files(engine_dir)
        if path.name in _ENGINE_FILES or any(p.fullmatch(path.name) for p in patterns)
    ]
    return sorted(found, key=lambda path: (path.name not in MANIFESTS, path.name))


def bake_files(folder: Path) -> list[Path]:
    """List the files of a bake without those of its plans; the weights come first."""
    found = [
        path
        for path in _own_files(folder)
        if path.name in {*_BAKE_FILES, BLOCKS}
        or any(p.fullmatch(path.name) for p in (_ONNX, MARK_NAME))
    ]
    # without its weights the rest is never used, should a file be open on Windows
    return sorted(found, key=lambda path: (path.name != BLOCKS, path.name))


def plan_folders(folder: Path) -> list[Path]:
    """List the folders below a checkpoint's or a bake's that hold plans or the record of some."""
    folders = (path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink())
    return [path for path in folders if engine_files(path) or _has_lock(path)]


def size_of(files: Iterable[Path]) -> int:
    """Return the bytes that files take."""
    return sum(path.stat().st_size for path in files)


def remove_engine(engine_dir: Path, used: float | None = None) -> int:
    """Delete an engine; return the bytes that this freed.

    Args:
        engine_dir: Folder of the plans.
        used: Its last use as far as is known: used or built since, it stays.

    Raises:
        EngineBusyError: It is being built, or a process has it open.
    """
    with locked_at_once(engine_dir):
        if is_in_use(engine_dir):
            raise EngineInUseError(engine_dir)
        if used is not None and last_used(engine_dir) > used:
            return 0
        freed = remove_files(engine_files(engine_dir))
    _remove_folder(engine_dir)
    return freed


def remove_bake(folder: Path, used: float | None = None) -> int:
    """Delete a bake; return the bytes that this freed. The caller holds the lock of its parent.

    Args:
        folder: Of the bake.
        used: As for ``remove_engine``.

    Raises:
        EngineBusyError: One of its plans is being built, or a process has it open.
    """
    if is_in_use(folder):
        raise EngineInUseError(folder)
    if used is not None and last_used(folder) > used:
        return 0
    freed = 0
    for plans in plan_folders(folder):
        freed += remove_engine(plans)
    freed += remove_files(bake_files(folder))
    _remove_folder(folder)
    return freed


def remove_files(files: Iterable[Path]) -> int:
    """Delete files; return their size. One that is in use (on Windows) stays and is logged."""
    return sum(map(_removed_bytes, files))


def _has_lock(folder: Path) -> bool:
    return any(path.name == LOCK for path in _own_files(folder))


def _removed_bytes(path: Path) -> int:
    try:
        size = path.stat().st_size
        path.unlink()
    except OSError as error:
        logger.warning("'%s' was not deleted: %s", path.name, error)
        return 0
    return size


def _own_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]


def _remove_folder(folder: Path) -> None:
    """Delete a folder if nothing but its lock is left in it."""
    if {path.name for path in folder.iterdir()} <= {LOCK}:
        # not empty: a build has begun meanwhile
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()
