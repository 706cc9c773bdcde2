"""What quantization leaves on disk besides quantized checkpoints."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from .errors.files import QuantizedCheckpointError
from .model_folders import ModelFolders, checkpoint_file
from .quantized_checkpoint import QuantizedCheckpoint
from .statistics_names import statistics_name
from .whole_files import TEMPORARY_END

logger = logging.getLogger(__name__)

YOUNG_SECONDS = 86400.0
"""Nothing but its age tells what a running export or calibration writes from what a killed one
left."""

_STATISTICS_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")
_TEMPORARY = re.compile(rf"\..+{TEMPORARY_END}")
"""What an export or a calibration writes to until a file is whole."""
_STATISTICS_FILES = re.compile(
    r"(double|single)_blocks\.\d{1,4}\.safetensors|velocity_sqnr_db\.txt|\.lock"
    rf"|{_TEMPORARY.pattern}"
)


@dataclass(frozen=True)
class Leftover:
    """Something that takes room and may not be needed.

    Attributes:
        kind: What it is.
        path: The file or folder.
        reason: Why it can go, or what it is still for.
        bytes: What it takes.
        used: When it was written to last, in seconds since 1970.
        remove: Deletes it and returns the bytes that this freed. None: it is only reported.
    """

    kind: Literal["temporary file", "statistics", "unfinished build"]
    path: Path
    reason: str
    bytes: int
    used: float
    remove: Callable[[], int] | None


def find_leftovers(folders: ModelFolders, now: float) -> list[Leftover]:
    """Find what quantization left and is older than a day; nothing is deleted.

    Args:
        folders: Where to look.
        now: In seconds since 1970.
    """
    found = []
    for path in temporary_files(folders):
        reason = "left by a process that was killed"
        found.append(_leftover("temporary file", path, reason, partial(_removed_bytes, path)))
    for path in unused_statistics(folders):
        reason = "no checkpoint here was made with it"
        found.append(_leftover("statistics", path, reason, partial(remove_statistics, path)))
    for path in unfinished_checkpoints(folders):
        reason = "the same quantization goes on with it"
        found.append(_leftover("unfinished build", path, reason, None))
    return [leftover for leftover in found if now - leftover.used > YOUNG_SECONDS]


def _leftover(
    kind: Literal["temporary file", "statistics", "unfinished build"],
    path: Path,
    reason: str,
    remove: Callable[[], int] | None,
) -> Leftover:
    states = [file.stat() for file in (statistics_files(path) if path.is_dir() else [path])]
    used = max((state.st_mtime for state in states), default=path.stat().st_mtime)
    return Leftover(kind, path, reason, sum(state.st_size for state in states), used, remove)


def unused_statistics(folders: ModelFolders) -> list[Path]:
    """List the folders of statistics that no quantized checkpoint was made with.

    Another recipe for the same source and samples would still take them. As long as one checkpoint
    cannot be read or one quantization is unfinished, all count as used.
    """
    if unfinished_checkpoints(folders):
        return []
    used = set()
    for folder in folders.checkpoint_folders():
        try:
            metadata = QuantizedCheckpoint.read(checkpoint_file(folder)).metadata
        except QuantizedCheckpointError:
            return []
        used.add(statistics_name(metadata.source_digest, metadata.calibration_digest))
    if not folders.statistics.is_dir():
        return []
    return [
        path
        for path in sorted(folders.statistics.iterdir())
        if _STATISTICS_NAME.fullmatch(path.name)
        and path.is_dir()
        and not path.is_symlink()
        and path.name not in used
    ]


def statistics_files(folder: Path) -> list[Path]:
    """List the files of one folder of statistics, and nothing that somebody else put there."""
    return [
        path
        for path in sorted(folder.iterdir())
        if _STATISTICS_FILES.fullmatch(path.name) and path.is_file() and not path.is_symlink()
    ]


def remove_statistics(folder: Path) -> int:
    """Delete one folder of statistics; return the bytes that this freed."""
    freed = sum(map(_removed_bytes, statistics_files(folder)))
    # what somebody else put there stays
    with contextlib.suppress(OSError):
        folder.rmdir()
    return freed


def _removed_bytes(path: Path) -> int:
    try:
        size = path.stat().st_size
        path.unlink()
    except OSError as error:
        logger.warning("'%s' was not deleted: %s", path.name, error)
        return 0
    return size


def statistics_bytes(folders: ModelFolders) -> int:
    """Return what all calibration statistics take."""
    if not folders.statistics.is_dir():
        return 0
    places = [path for path in folders.statistics.iterdir() if path.is_dir()]
    return sum(file.stat().st_size for place in places for file in statistics_files(place))


def temporary_files(folders: ModelFolders) -> Iterator[Path]:
    """Yield what killed exports and calibrations left, or what running ones write to."""
    places = [*folders.checkpoint_folders()]
    if folders.statistics.is_dir():
        places += [path for path in folders.statistics.iterdir() if path.is_dir()]
    for place in places:
        for path in sorted(place.iterdir()):
            if _TEMPORARY.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                yield path


def unfinished_checkpoints(folders: ModelFolders) -> list[Path]:
    """List the hidden files of quantizations that did not finish; quantizing again goes on."""
    return [
        path
        for root in folders.roots
        if root.is_dir()
        for path in sorted(root.glob("*/.*.partial"))
        if path.is_file() and path.name == f".{path.parent.name}.partial"
    ]
