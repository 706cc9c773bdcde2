"""Command `gc`: what is not needed, and deleting it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import OptionError
from .folders import model_folders

if TYPE_CHECKING:
    from ..quant.model_folders import ModelFolders
    from ..trt_runtime.cleanup import Finding, Kind

DAY = 86400.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("--delete", action="store_true", help="delete what is listed")
    parser.add_argument(
        "--quota",
        type=float,
        metavar="GB",
        help="also list the engines and bakes used longest ago, until the others fit",
    )
    parser.add_argument(
        "--days",
        type=float,
        default=30.0,
        help="baked LoRAs not used for so long can go (default: 30)",
    )


def run(chosen: argparse.Namespace) -> int:
    """Print what can go, and delete it if asked to."""
    if chosen.quota is not None and not 0 <= chosen.quota <= 1e6:
        raise OptionError("--quota", f"{chosen.quota} is not between 0 and 1000000 GB")
    if not 0 <= chosen.days <= 1e5:
        raise OptionError("--days", f"{chosen.days} is not between 0 and 100000")
    quota = None if chosen.quota is None else round(chosen.quota * 1e9)
    findings = find_all(model_folders(chosen.models), time.time(), chosen.days * DAY, quota)
    _show(findings, chosen.delete)
    if chosen.delete:
        print(f"{sum(map(_removed, findings)) / 1e6:,.1f} MB were deleted")
    return 0


def find_all(
    folders: ModelFolders, now: float, unused_seconds: float, quota: int | None
) -> list[Finding]:
    """Find what can go in a models folder; nothing is deleted.

    Args:
        folders: Where to look.
        now: In seconds since 1970.
        unused_seconds: Bakes that were not used for so long can go.
        quota: Bytes that engines and bakes may take; None is no limit.
    """
    from ..trt_runtime.cleanup import evict, find_unneeded
    from ..trt_runtime.driver import driver_version
    from .inventory import content_digest

    driver = driver_version()
    known = None if driver == "unknown" else driver
    checkpoints = sorted(folders.checkpoint_folders())
    findings: list[Finding] = []
    for folder in checkpoints:
        findings += find_unneeded(folder, content_digest(folder), known, now - unused_seconds)
    if quota is not None:
        findings += evict(checkpoints, findings, quota)
    return findings + _quantization_findings(folders, now)


def _quantization_findings(folders: ModelFolders, now: float) -> list[Finding]:
    from ..quant import leftovers
    from ..trt_runtime.removal import remove_files

    findings = []
    # nothing tells a running export or calibration from a killed one but its age
    for path in leftovers.temporary_files(folders):
        reason = "left by a process that was killed"
        remove = partial(remove_files, [path])
        findings.append(_finding("temporary file", path, [path], reason, remove))
    for path in leftovers.unused_statistics(folders):
        files = leftovers.statistics_files(path)
        reason = "no checkpoint here was made with it"
        remove = partial(leftovers.remove_statistics, path)
        findings.append(_finding("statistics", path, files, reason, remove))
    for path in leftovers.unfinished_checkpoints(folders):
        reason = "the same quantization goes on with it"
        findings.append(_finding("unfinished build", path, [path], reason, None))
    return [finding for finding in findings if now - finding.used > DAY]


def _finding(
    kind: Kind, path: Path, files: list[Path], reason: str, remove: Callable[[], int] | None
) -> Finding:
    from ..trt_runtime.cleanup import Finding
    from ..trt_runtime.removal import size_of

    used = max((file.stat().st_mtime for file in files), default=path.stat().st_mtime)
    return Finding(kind, path, reason, size_of(files), used, remove)


def _show(findings: list[Finding], delete: bool) -> None:
    from .tables import print_table

    if not findings:
        print("Nothing to delete.")
        return
    rows = [
        (
            finding.kind,
            str(finding.path),
            f"{finding.bytes / 1e6:,.1f} MB",
            time.strftime("%Y-%m-%d", time.localtime(finding.used)),
            finding.reason if finding.remove else f"{finding.reason} (only reported)",
        )
        for finding in findings
    ]
    print_table(("what", "where", "size", "last use", "why"), rows)
    total = sum(finding.bytes for finding in findings if finding.remove)
    if not delete:
        print(f"{total / 1e6:,.1f} MB can go; nothing was deleted. Add --delete to delete it.")


def _removed(finding: Finding) -> int:
    from ..trt_runtime.errors.storage import EngineBusyError

    if finding.remove is None:
        return 0
    try:
        return finding.remove()
    except EngineBusyError as error:
        print(error, file=sys.stderr)
        return 0
