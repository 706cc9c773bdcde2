"""Cores and memory that this process may use, and how many build processes they are enough for."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from pathlib import Path
from typing import NamedTuple

import psutil

logger = logging.getLogger(__name__)

GIB = 1 << 30

AUTOMATIC = 0
"""The number of build processes that stands for `automatic_workers`."""

MAX_WORKERS = 16

RESERVE_BYTES = GIB
"""Memory that stays free beside the build processes."""

WORKER_BYTES = 600 << 20
"""What a build process takes besides twice its block's weights. Measured are 0.8 GB for a double
block of FLUX.1 in NVFP4 (0.2 GB of weights), for FLUX.2-dev 1.7 GB in NVFP4 (0.55 GB) and 2.4 GB in
FP8 (1 GB)."""

CGROUPS = Path("/sys/fs/cgroup")

# limit, use, statistics and the name of the file cache in them: version 2, version 1
_MEMORY_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


class Memory(NamedTuple):
    """Bytes of main memory; compares by what is free."""

    free: int
    total: int

    def __str__(self) -> str:
        return f"{self.free / GIB:.1f} of {self.total / GIB:.1f} GiB"


def free_memory() -> Memory:
    """Return what can be taken without swapping; in a container its own limit counts."""
    machine = psutil.virtual_memory()
    found = Memory(machine.available, machine.total)
    for limit_file, use_file, stat_file, cache in _MEMORY_FILES:
        # no such files, or "max": no limit of that kind
        with contextlib.suppress(OSError, ValueError, StopIteration):
            limit = int((CGROUPS / limit_file).read_text())
            use = int((CGROUPS / use_file).read_text())
            lines = (line.split() for line in (CGROUPS / stat_file).read_text().splitlines())
            reclaimable = next(int(value) for name, value in lines if name == cache)
            if limit < found.total:
                free = max(0, min(found.free, limit - use + reclaimable))
                found = Memory(free, limit)
    return found


def usable_cores() -> int:
    """Return the number of physical cores, or less where this process may use fewer CPUs."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):
        quota, period = (CGROUPS / "cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)


def automatic_workers(weight_bytes: int) -> int:
    """Choose how many blocks to build side by side, and log why.

    Args:
        weight_bytes: Size of the largest block's weights.
    """
    cores, memory = usable_cores(), free_memory()
    each = WORKER_BYTES + 2 * weight_bytes
    workers = max(1, min(cores, (memory.free - RESERVE_BYTES) // each, MAX_WORKERS))
    logger.info(
        "%d build processes: %d cores, %s of memory free, %.1f GiB for each",
        workers,
        cores,
        memory,
        each / GIB,
    )
    return workers
