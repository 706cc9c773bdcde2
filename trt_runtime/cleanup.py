"""What of an engine store can go: stale engines, plans nobody names, old kernels, unused bakes.

Finding deletes nothing. Each finding knows how it is deleted, which takes the lock of its folder,
so that nothing is taken from a build that is running, nor from a process that has it open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from .bakes import BAKES, bake_folders
from .driver import UNKNOWN, driver_version
from .engine_state import engine_state
from .errors.engine import ManifestInvalidError, ManifestMissingError
from .in_use import is_in_use
from .last_use import last_used
from .manifest import (
    BAKED,
    MANIFEST,
    UNFINISHED,
    VARIANTS,
    EngineManifest,
    load_manifest,
    plan_files,
    read_manifest_file,
    variants_manifest,
)
from .removal import (
    bake_files,
    engine_files,
    plan_folders,
    remove_bake,
    remove_engine,
    remove_files,
    size_of,
)
from .runtime_cache import CACHE_NAME, cache_owner
from .store import TEMPORARY_NAME, is_locked, locked_at_once

Kind = Literal["engine", "bake", "plan", "kernels", "temporary file", "unfinished build"]


UNUSED_SECONDS = 30 * 86400.0
"""Baked LoRAs that nobody used for so long can go, unless somebody says otherwise."""


@dataclass(frozen=True)
class Finding:
    """Something that takes room and may not be needed.

    Attributes:
        kind: What it is.
        path: The file or folder.
        reason: Why it can go.
        bytes: What it takes.
        used: When it was used last, in seconds since 1970.
        remove: Deletes it and returns the bytes that this freed; raises EngineBusyError while it
            is being built. None: it is only reported.
    """

    kind: Kind
    path: Path
    reason: str
    bytes: int
    used: float
    remove: Callable[[], int] | None


def engine_folders(checkpoint_folder: Path) -> list[Path]:
    """List the folders of engines, finished or not, of a quantized checkpoint."""
    return [
        folder
        for folder in plan_folders(checkpoint_folder)
        if (folder / MANIFEST).is_file() or (folder / UNFINISHED).is_file()
    ]


def find_in_store(
    checkpoints: Mapping[Path, str | None], unused_since: float, quota: int | None
) -> list[Finding]:
    """Look through the folders of quantized checkpoints.

    Args:
        checkpoints: Content digest by folder; None for a checkpoint that cannot be read.
        unused_since: Bakes that were not used after this time, in seconds since 1970, can go.
        quota: Bytes that engines and bakes may take; None is no limit.
    """
    found = driver_version()
    driver = None if found == UNKNOWN else found
    findings: list[Finding] = []
    for folder, digest in checkpoints.items():
        findings += find_unneeded(folder, digest, driver, unused_since)
    if quota is not None:
        findings += evict(list(checkpoints), findings, quota)
    return findings


def find_unneeded(
    checkpoint_folder: Path,
    checkpoint_digest: str | None,
    driver: str | None,
    unused_since: float,
) -> Iterator[Finding]:
    """Look through the folder of one quantized checkpoint.

    Args:
        checkpoint_folder: Holds the engines and the bakes.
        checkpoint_digest: Content digest of the checkpoint; None if it cannot be read.
        driver: Version of the NVIDIA driver; None if it is unknown, and all kernels stay.
        unused_since: Bakes that were not used after this time can go.
    """
    for folder in plan_folders(checkpoint_folder):
        state = engine_state(folder, checkpoint_digest)
        if _is_busy(folder):
            continue
        if state.is_stale:
            yield engine_finding(folder, state.fault)
            continue
        yield from _parts(folder, state.manifest, driver)
    for bake in bake_folders(checkpoint_folder / BAKES):
        if is_in_use(bake):
            continue
        reason = _bake_fault(bake, checkpoint_digest, unused_since)
        if reason:
            yield bake_finding(bake, reason)
            continue
        for folder in plan_folders(bake):
            if not is_locked(folder):
                yield from _parts(folder, _engine_of_bake(folder), driver)


def engine_finding(engine_dir: Path, reason: str) -> Finding:
    """Describe an engine that can go."""
    size = size_of(engine_files(engine_dir))
    used = last_used(engine_dir)
    return Finding(
        "engine", engine_dir, reason, size, used, partial(remove_engine, engine_dir, used)
    )


def bake_finding(bake: Path, reason: str) -> Finding:
    """Describe a bake that can go."""
    files = [*bake_files(bake), *(f for plans in plan_folders(bake) for f in engine_files(plans))]
    used = last_used(bake)

    def remove() -> int:
        with locked_at_once(bake.parent):
            return remove_bake(bake, used)

    return Finding("bake", bake, reason, size_of(files), used, remove)


def evict(
    checkpoint_folders: Sequence[Path], already: Sequence[Finding], quota: int
) -> list[Finding]:
    """Choose the engines and bakes that were used longest ago, until the others fit a quota.

    Args:
        checkpoint_folders: Whose engines and bakes count.
        already: What goes anyway.
        quota: Bytes that engines and bakes may take.
    """
    gone = {finding.path for finding in already if finding.remove is not None}
    kept = []
    for folder in checkpoint_folders:
        kept += [engine_finding(path, "") for path in engine_folders(folder) if path not in gone]
        bakes = bake_folders(folder / BAKES)
        kept += [bake_finding(path, "") for path in bakes if path not in gone]
    kept = [replace(one, bytes=one.bytes - _bytes_within(one.path, already)) for one in kept]
    excess = sum(finding.bytes for finding in kept) - quota
    reason = f"used longest ago, the quota is {quota / 1e9:g} GB"
    chosen = []
    for finding in sorted(kept, key=lambda finding: finding.used):
        if excess <= 0:
            break
        # the lock of a bake is that of the folder of all bakes
        if not _is_busy(finding.path) and not is_locked(finding.path.parent):
            chosen.append(replace(finding, reason=reason))
            excess -= finding.bytes
    return chosen


def _is_busy(folder: Path) -> bool:
    return is_locked(folder) or is_in_use(folder)


def _bytes_within(folder: Path, findings: Sequence[Finding]) -> int:
    inside = (f for f in findings if f.remove is not None and folder in f.path.parents)
    return sum(finding.bytes for finding in inside)


def _bake_fault(bake: Path, checkpoint_digest: str | None, unused_since: float) -> str:
    for folder in plan_folders(bake):
        record = _readable(folder / BAKED)
        if record and checkpoint_digest not in (None, record.checkpoint_digest):
            return "its checkpoint was quantized again"
    return "not used for long" if last_used(bake) < unused_since else ""


def _parts(folder: Path, engine: EngineManifest | None, driver: str | None) -> Iterator[Finding]:
    """Find what can go of a folder of plans that itself stays."""
    for path in engine_files(folder):
        if TEMPORARY_NAME.fullmatch(path.name):
            yield _file_finding("temporary file", path, "left by a process that was killed")
    for path in _unnamed_plans(folder, engine):
        yield _file_finding("plan", path, "no manifest names it")
    if (folder / UNFINISHED).is_file():
        used = (folder / UNFINISHED).stat().st_mtime
        size = size_of([folder / UNFINISHED])
        reason = "the next build goes on with it"
        yield Finding("unfinished build", folder / UNFINISHED, reason, size, used, None)
    for path in engine_files(folder):
        reason = _kernels_fault(path, engine, driver)
        if reason:
            yield _file_finding("kernels", path, reason)


def _unnamed_plans(folder: Path, engine: EngineManifest | None) -> list[Path]:
    wanted = _wanted_plans(folder, engine)
    if wanted is None:
        return []
    return [p for p in plan_files(folder) if p.name not in wanted and not p.is_symlink()]


def _wanted_plans(folder: Path, engine: EngineManifest | None) -> set[str] | None:
    """Return the plans that a record names; None if a record cannot be read."""
    present = [folder / name for name in (MANIFEST, UNFINISHED, BAKED)]
    records = [_readable(path) for path in present if path.is_file()]
    if engine is not None and (folder / MANIFEST).is_file():
        variants = variants_manifest(folder / VARIANTS, engine)
        records += [variants] if variants else []
    wanted = set()
    for record in records:
        if record is None:
            return None
        wanted |= {entry.file for entry in record.blocks}
    return wanted


def _readable(record: Path) -> EngineManifest | None:
    try:
        return read_manifest_file(record) if record.is_file() else None
    except ManifestInvalidError:
        return None


def _engine_of_bake(folder: Path) -> EngineManifest | None:
    """Return the manifest of the engine whose blocks a bake's plans stand for."""
    try:
        return load_manifest(folder.parent.parent.parent / folder.name)
    except (ManifestMissingError, ManifestInvalidError):
        return None


def _kernels_fault(path: Path, engine: EngineManifest | None, driver: str | None) -> str:
    owner = cache_owner(path) if CACHE_NAME.fullmatch(path.name) else None
    if owner is None:
        return ""
    if driver is not None and not owner.endswith(f", driver {driver}"):
        return f"compiled for {owner}; the driver is {driver} now"
    if engine is not None and not owner.startswith(f"{engine.built_with} on "):
        return f"compiled by {owner}; the engine is of {engine.built_with}"
    return ""


def _file_finding(kind: Kind, path: Path, reason: str) -> Finding:
    status = path.stat()

    def remove() -> int:
        with locked_at_once(path.parent):
            # built again since it was found
            changed = path.is_file() and path.stat().st_mtime != status.st_mtime
            return 0 if changed else remove_files([path])

    return Finding(kind, path, reason, status.st_size, status.st_mtime, remove)
