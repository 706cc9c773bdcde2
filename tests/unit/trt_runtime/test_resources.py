"""How many build processes a machine gets; limits of containers are files that a test can write."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from flux_fp4.trt_runtime import resources
from flux_fp4.trt_runtime.resources import (
    GIB,
    Memory,
    automatic_workers,
    free_memory,
    usable_cores,
)


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 16 cores and 60 of 64 GiB free; its control groups are the test's."""
    monkeypatch.setattr(resources, "CGROUPS", tmp_path)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 32 if logical else 16)
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    memory = SimpleNamespace(available=60 * GIB, total=64 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return tmp_path


def write_limit(root: Path, limit: str, version: int = 2) -> None:
    """Limit memory; 2 GiB of it are used, one of them by the file cache."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    folder = root / "memory" if version == 1 else root
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(limit + "\n")
    (folder / names[1]).write_text(f"{2 * GIB}\n")
    (folder / "memory.stat").write_text(f"anon {GIB}\n{names[2]} {GIB}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_limit_of_a_container_counts(cgroups: Path, version: int) -> None:
    assert free_memory() == Memory(60 * GIB, 64 * GIB)
    write_limit(cgroups, str(8 * GIB), version)
    assert free_memory() == Memory(7 * GIB, 8 * GIB)


@pytest.mark.parametrize("limit", ["max", str(1 << 62), "?"])
def test_no_limit_changes_nothing(cgroups: Path, limit: str) -> None:
    write_limit(cgroups, limit)
    assert free_memory() == Memory(60 * GIB, 64 * GIB)


def test_cores_are_physical_and_allowed(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores() == 16
    (cgroups / "cpu.max").write_text("250000 100000\n")
    assert usable_cores() == 3
    (cgroups / "cpu.max").write_text("max 100000\n")
    assert usable_cores() == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5}, raising=False)
    assert usable_cores() == 2


@pytest.mark.parametrize(
    ("free_gib", "weights_gib", "workers"),
    [(60, 0.2, 16), (6, 0.2, 5), (6, 1.0, 1), (0.5, 0.2, 1)],
    ids=["cores", "memory", "memory of large blocks", "always one"],
)
def test_workers_fit_cores_and_memory(
    cgroups: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free_gib: float,
    weights_gib: float,
    workers: int,
) -> None:
    memory = SimpleNamespace(available=int(free_gib * GIB), total=64 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with caplog.at_level(logging.INFO, logger=resources.__name__):
        assert automatic_workers(int(weights_gib * GIB)) == workers
    assert f"{workers} build processes: 16 cores, {free_gib:.1f} of 64.0 GiB" in caplog.text
