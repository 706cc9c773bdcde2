"""Probes of `doctor` that look into the models folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .folders import model_folders, run_history


def disk(models: Sequence[Path] | None) -> list[dict[str, Any]]:
    """Tell the room on the disk of each models folder."""
    found = []
    for folder in model_folders(models).roots:
        existing = next(place for place in (folder, *folder.parents) if place.is_dir())
        usage = shutil.disk_usage(existing)
        found.append({"folder": str(folder), "free_bytes": usage.free, "total_bytes": usage.total})
    return found


def models(models: Sequence[Path] | None) -> dict[str, Any]:
    """Tell checkpoints and engines with their state, as `list` does."""
    from .inventory import inventory

    return inventory(model_folders(models))


def machines(models: Sequence[Path] | None) -> list[dict[str, Any]]:
    """Tell on which machines engines have compiled kernels and passed the self-test, or failed."""
    from ..trt_runtime.cleanup import engine_folders
    from ..trt_runtime.removal import engine_files
    from ..trt_runtime.runtime_cache import CACHE_NAME, cache_owner
    from ..trt_runtime.self_test_record import failed_test, passed_tests

    found = []
    for checkpoint in sorted(model_folders(models).checkpoint_folders()):
        for folder in engine_folders(checkpoint):
            caches = [path for path in engine_files(folder) if CACHE_NAME.fullmatch(path.name)]
            found.append(
                {
                    "engine": f"{checkpoint.name}/{folder.name}",
                    "kernels": [
                        {"of": cache_owner(path), "bytes": path.stat().st_size} for path in caches
                    ],
                    "self_tests_passed": list(passed_tests(folder).values()),
                    "self_test_failed": failed_test(folder),
                }
            )
    return found


def durations(models: Sequence[Path] | None) -> dict[str, Any]:
    """Tell how many runs of which work are known of this machine, for estimates."""
    history = run_history(model_folders(models))
    return {"machine": history.machine, "runs": history.kinds}


def leftovers(models: Sequence[Path] | None) -> list[str]:
    """Tell what `gc` would show."""
    from ..trt_runtime.cleanup import UNUSED_SECONDS
    from .collect import find_all

    findings = find_all(model_folders(models), time.time(), UNUSED_SECONDS, None)
    return [f"{finding.kind} {finding.path}: {finding.reason}" for finding in findings]
