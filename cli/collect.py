"""Command `gc`: what is not needed, and deleting it."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from .errors import OptionError
from .folders import model_folders

if TYPE_CHECKING:
    from ..quant.leftovers import Leftover
    from ..quant.model_folders import ModelFolders
    from ..trt_runtime.cleanup import Finding

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
) -> list[Finding | Leftover]:
    """Find what can go in models folders; nothing is deleted.

    Args:
        folders: Where to look.
        now: In seconds since 1970.
        unused_seconds: Bakes that were not used for so long can go.
        quota: Bytes that engines and bakes may take; None is no limit.
    """
    from ..quant.inventory import stored_checkpoints
    from ..quant.leftovers import find_leftovers
    from ..trt_runtime.cleanup import find_in_store

    digests = {stored.folder: stored.content_digest for stored in stored_checkpoints(folders)}
    engines = find_in_store(digests, now - unused_seconds, quota)
    return [*engines, *find_leftovers(folders, now)]


def _show(findings: list[Finding | Leftover], delete: bool) -> None:
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


def _removed(finding: Finding | Leftover) -> int:
    from ..trt_runtime.errors.storage import EngineBusyError

    if finding.remove is None:
        return 0
    try:
        return finding.remove()
    except EngineBusyError as error:
        print(error, file=sys.stderr)
        return 0
