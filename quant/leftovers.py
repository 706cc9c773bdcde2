"""What quantization leaves on disk besides quantized checkpoints."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from .errors.files import QuantizedCheckpointError
from .model_folders import ModelFolders, checkpoint_file
from .quantized_checkpoint import QuantizedCheckpoint
from .statistics_names import statistics_name
from .whole_files import TEMPORARY_END

_STATISTICS_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")
_TEMPORARY = re.compile(rf"\..+{TEMPORARY_END}")
"""What an export or a calibration writes to until a file is whole."""
_STATISTICS_FILES = re.compile(
    r"(double|single)_blocks\.\d{1,4}\.safetensors|velocity_sqnr_db\.txt|\.lock"
    rf"|{_TEMPORARY.pattern}"
)


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
    freed = 0
    for path in statistics_files(folder):
        freed += path.stat().st_size
        path.unlink()
    # what somebody else put there stays
    with contextlib.suppress(OSError):
        folder.rmdir()
    return freed


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
