"""What this machine has, and what of it stands in the way of a job."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..trt_runtime.resources import free_memory

WINDOWS_MAX_PATH = 259
"""Characters that Windows takes without the long path option, which few have switched on."""

LONGEST_NAME = 120
"""Characters behind a checkpoint's folder at most: ``baked/``, 32 digits, the target, and a plan
with its temporary suffix."""


@dataclass(frozen=True)
class Machine:
    """What the checks look at.

    Attributes:
        system: As ``sys.platform``.
        free_memory: Main memory that programs can still have, in bytes.
        free_disk: Of the disk that a folder lies on.
        write_fault: Why no file can be made in the folder; empty if one can.
    """

    system: str
    free_memory: int
    free_disk: int
    write_fault: str

    @classmethod
    def at(cls, folder: Path) -> Machine:
        """Look at this machine; the folder need not exist."""
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        return cls(
            sys.platform,
            free_memory().free,
            shutil.disk_usage(existing).free,
            _write_fault(existing),
        )


def folder_problems(machine: Machine, folder: Path, needed_disk: int) -> list[str]:
    """Say what is wrong with a folder for files of this size.

    Args:
        machine: Looked at for this folder.
        folder: Where a checkpoint and its engines go.
        needed_disk: Bytes that will be written.
    """
    problems = []
    if machine.write_fault:
        problems.append(
            f"'{folder}' cannot be written to: {machine.write_fault}. Allow ComfyUI to write "
            "there, or add another 'flux_fp4' folder to extra_model_paths.yaml."
        )
    if machine.free_disk < needed_disk:
        problems.append(
            f"The disk of '{folder}' has {gigabytes(machine.free_disk)} left, and "
            f"{gigabytes(needed_disk)} are needed. Free some space, or add a 'flux_fp4' folder on "
            "another disk to extra_model_paths.yaml."
        )
    if machine.system == "win32":
        problems += _windows_problems(folder)
    return problems


def memory_problems(machine: Machine, needed: int) -> list[str]:
    """Say whether main memory is too small."""
    if machine.free_memory >= needed:
        return []
    return [
        f"{gigabytes(machine.free_memory)} of main memory are free, and {gigabytes(needed)} are "
        "needed. Close other programs, or press 'Free model and node cache' in ComfyUI."
    ]


def gigabytes(size: float) -> str:
    """Return a size as text."""
    return f"{size / 1e9:.1f} GB"


def _windows_problems(folder: Path) -> list[str]:
    problems = []
    length = len(str(folder)) + 1 + LONGEST_NAME
    if length > WINDOWS_MAX_PATH:
        problems.append(
            f"Files in '{folder}' would have paths of {length} characters; Windows takes "
            f"{WINDOWS_MAX_PATH}. Choose a shorter name, or a 'flux_fp4' folder nearer to the root."
        )
    if not str(folder).isascii():
        problems.append(
            f"'{folder}' has letters beyond ASCII, and TensorRT opens files by ASCII paths on "
            "Windows. Choose another name, or a 'flux_fp4' folder with a plain path in "
            "extra_model_paths.yaml."
        )
    return problems


def _write_fault(folder: Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
