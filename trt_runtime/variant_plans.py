"""Plans of other forms of an engine's blocks, built when they are first wanted.

    <checkpoint>/<target>/variants.json                 blocks that take LoRA factors, a mask, both
    <checkpoint>/baked/<key>/<target>/baked.json        blocks with a LoRA in their weights

A block that takes factors has up to 1.7 times the kernels, so blocks without a LoRA keep the plain
plan. All such plans belong to one engine: same library, targets, profile and checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from .backend import load_backend
from .contract import variant_name
from .errors.backend import EngineVersionError
from .errors.blocks import BlocksMissingError
from .errors.engine import EngineStaleError
from .manifest import (
    BAKED,
    VARIANTS,
    EngineManifest,
    PlanEntry,
    check_onnx,
    load_manifest,
    variants_manifest,
    write_manifest,
)
from .plan_build import PlanBuild
from .progress import Progress
from .selection import Selection
from .signature import BlockSignature, read_signature
from .store import locked, make_folder
from .worker_pool import build_plans

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelectedPlan:
    """A plan and the folder it lies in."""

    folder: Path
    entry: PlanEntry


def selected_plans(
    engine_dir: Path, engine: EngineManifest, selection: Selection
) -> dict[str, SelectedPlan]:
    """Return the plans of a selection by block, as far as they are there.

    The digest of a plan is not looked at: `check_plan` does before anything is deserialized.
    """
    own = {entry.block: entry for entry in engine.blocks}
    if selection.adapters or selection.masked:
        own |= built_variants(engine_dir, engine)
    baked, baked_dir = {}, engine_dir
    if selection.baked is not None:
        baked_dir = selection.baked.plan_dir(engine_dir)
        baked = _usable(baked_dir, BAKED, engine)
    found = {}
    for block in engine.expected_blocks:
        is_baked = selection.is_baked(block)
        entry = (baked if is_baked else own).get(selection.name_of(block))
        if entry is not None:
            found[block] = SelectedPlan(baked_dir if is_baked else engine_dir, entry)
    return found


def built_variants(engine_dir: Path, engine: EngineManifest) -> dict[str, PlanEntry]:
    """Return the variants of an engine's own blocks that are there, by their names."""
    return _usable(engine_dir, VARIANTS, engine)


def build_selected(
    engine_dir: Path, selection: Selection, progress: Progress, workers: int = 1
) -> None:
    """Build the plans of a selection that are missing beside a finished engine.

    Args:
        engine_dir: Folder with the engine's manifest; the ONNX files are in its parent.
        selection: What shall run.
        progress: Called at least every 0.1 s while blocks are built; may raise to cancel.
        workers: Number of build processes, or `AUTOMATIC`.

    Raises:
        EngineVersionError: The engine was built with another library release.
        BlocksMissingError: A block was exported without this form.
        EngineStaleError: A form was exported from other weights than the engine's.
        EngineError: Any of the build errors; plans that were finished before are kept.
    """
    engine = load_manifest(engine_dir)
    found = selected_plans(engine_dir, engine, selection)
    own: set[str] = set()
    baked: set[str] = set()
    for block in engine.expected_blocks:
        if block not in found:
            (baked if selection.is_baked(block) else own).add(selection.name_of(block))
    if own:
        _build(engine, engine_dir.parent, engine_dir, VARIANTS, own, progress, workers)
    if baked:
        assert selection.baked is not None
        plan_dir = selection.baked.plan_dir(engine_dir)
        make_folder(plan_dir)
        _build(engine, selection.baked.folder, plan_dir, BAKED, baked, progress, workers)


def form_signature(folder: Path, name: str, checkpoint_digest: str) -> BlockSignature:
    """Read the ONNX file of one form of a block.

    Args:
        folder: Of the ONNX files.
        name: Of the form.
        checkpoint_digest: Of the checkpoint that it must belong to.

    Raises:
        BlocksMissingError: It was not exported.
        BlockContractError: The file is no block.
        EngineStaleError: It was exported from another checkpoint.
    """
    path = folder / f"{name}.onnx"
    if not path.is_file():
        raise BlocksMissingError(folder, [name])
    signature = read_signature(path)
    if signature.checkpoint_digest != checkpoint_digest:
        raise EngineStaleError(path.name, "was exported from other weights than the engine's")
    return signature


def _build(
    engine: EngineManifest,
    folder: Path,
    plan_dir: Path,
    record: str,
    names: Collection[str],
    progress: Progress,
    workers: int,
) -> None:
    """Build plans and add them to a record; those that are in it stay."""
    backend = load_backend(engine.backend)
    if backend.version != engine.backend_version:
        raise EngineVersionError(engine.built_with, backend.label)
    total = len(names)
    with locked(plan_dir, lambda: progress("Waiting for another build of these plans", 0, total)):
        kept = _usable(plan_dir, record, engine)
        signatures = [
            form_signature(folder, name, engine.checkpoint_digest)
            for name in _every_form(engine)
            if name in names or (name in kept and (folder / f"{name}.onnx").is_file())
        ]
        build = PlanBuild(plan_dir, engine.spec, backend, signatures, progress, record)
        # all at once: the record is in force, and what it says must have been checked
        jobs = list(build.jobs((record,)))
        build_plans(jobs, workers or build.automatic_workers(), build.store, build.report)
        write_manifest(plan_dir / record, build.manifest())
    logger.info("Built %d plans besides those of %s", len(jobs), folder.name)


def _every_form(engine: EngineManifest) -> Iterator[str]:
    for block in engine.expected_blocks:
        for lora in (False, True):
            for mask in (False, True):
                yield variant_name(block, lora, mask)


def _usable(plan_dir: Path, record: str, engine: EngineManifest) -> dict[str, PlanEntry]:
    """Leave out what belongs to another engine, is older than its ONNX file, or is gone."""
    manifest = variants_manifest(plan_dir / record, engine)
    entries = manifest.blocks if manifest else ()
    return {entry.block: entry for entry in entries if _is_usable(plan_dir, entry)}


def _is_usable(plan_dir: Path, entry: PlanEntry) -> bool:
    path = plan_dir / entry.file
    try:
        check_onnx(plan_dir, entry)
    except EngineStaleError:
        return False
    return path.is_file() and not path.is_symlink() and path.stat().st_size == entry.bytes
