"""Plans of blocks whose weights were changed: they run in the place of an engine's own.

    <checkpoint>/baked/<key>/double_blocks.0.onnx      a changed block, and its weights beside it
    <checkpoint>/baked/<key>/<target>/baked.json       describes its plan for an engine's target

Such a folder is laid out as a checkpoint's, and its plans belong to one engine: same library,
targets, profile and checkpoint.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from .errors import BlocksMissingError, EngineStaleError
from .lora_plans import engine_backend, is_usable
from .manifest import (
    BAKED,
    EngineManifest,
    PlanEntry,
    load_manifest,
    variants_manifest,
    write_manifest,
)
from .plan_build import PlanBuild
from .progress import Progress
from .signature import BlockSignature, read_signature
from .store import locked, remove_temporaries
from .worker_process import build_plans

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BakedBlocks:
    """Changed blocks on disk.

    Attributes:
        folder: Holds the ONNX file of each.
        blocks: Their names; every one of them must run in the place of the engine's own.
    """

    folder: Path
    blocks: tuple[str, ...]

    def plan_dir(self, engine_dir: Path) -> Path:
        """Return the folder of the plans for an engine."""
        return self.folder / engine_dir.name


def baked_plans(
    engine_dir: Path, engine: EngineManifest, baked: BakedBlocks
) -> dict[str, PlanEntry]:
    """Return the plans of changed blocks that can be used with an engine, by block.

    Left out is what is older than its ONNX file, whose plan is gone, or what belongs to another
    engine. The digest is not looked at: `check_plan` does before anything is deserialized.
    """
    plan_dir = baked.plan_dir(engine_dir)
    found = variants_manifest(plan_dir / BAKED, engine)
    entries = {entry.block: entry for entry in found.blocks} if found else {}
    return {
        block: entries[block]
        for block in baked.blocks
        if block in entries and is_usable(plan_dir, entries[block])
    }


def build_baked_plans(
    engine_dir: Path, baked: BakedBlocks, progress: Progress, workers: int = 1
) -> EngineManifest:
    """Build the plans of changed blocks for a finished engine; those that exist are kept.

    Args:
        engine_dir: Folder with the engine's manifest.
        baked: The blocks.
        progress: Called at least every 0.1 s while blocks are built; may raise to cancel.
        workers: Number of build processes.

    Raises:
        EngineVersionError: The engine was built with another library release.
        BlocksMissingError: A block has no ONNX file.
        EngineStaleError: A block was changed from another checkpoint than the engine's.
        EngineError: Any of the build errors; plans that were finished before are kept.
    """
    engine = load_manifest(engine_dir)
    backend = engine_backend(engine)
    signatures = baked_signatures(baked, engine.checkpoint_digest)
    plan_dir = baked.plan_dir(engine_dir)
    plan_dir.mkdir(exist_ok=True)
    total = len(signatures)
    with locked(plan_dir, lambda: progress("Waiting for another build of this LoRA", 0, total)):
        remove_temporaries(plan_dir)
        build = PlanBuild(plan_dir, engine.spec, backend, signatures, progress, BAKED)
        jobs = build.reuse((BAKED,))
        build_plans(jobs, workers, build.store, build.report)
        manifest = build.manifest()
        write_manifest(plan_dir / BAKED, manifest)
    logger.info("Built %d plans of changed blocks of %s", len(jobs), engine_dir.parent.name)
    return manifest


def baked_signatures(baked: BakedBlocks, checkpoint_digest: str) -> list[BlockSignature]:
    """Read the ONNX files of changed blocks.

    Args:
        baked: The blocks.
        checkpoint_digest: Of the checkpoint that they must have been changed from.

    Raises:
        BlocksMissingError: A block has no ONNX file.
        BlockContractError: A file is no block.
        EngineStaleError: A block was changed from another checkpoint.
    """
    missing = [block for block in baked.blocks if not (baked.folder / f"{block}.onnx").is_file()]
    if missing:
        raise BlocksMissingError(baked.folder, missing)
    signatures = [read_signature(baked.folder / f"{block}.onnx") for block in baked.blocks]
    for signature in signatures:
        if signature.checkpoint_digest != checkpoint_digest:
            raise EngineStaleError(
                signature.path.name, "was changed from other weights than the engine's"
            )
    return signatures
