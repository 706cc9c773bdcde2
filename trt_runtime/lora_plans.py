"""Plans of block variants that take LoRA factors: built when a LoRA first touches the block.

A variant has about twice the kernels of the plain block, so blocks without a LoRA keep the plain
plan. Variants belong to one engine: same library, targets, profile and checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from .backend import Backend, load_backend
from .contract import lora_variant
from .errors import BlocksMissingError, EngineStaleError, EngineVersionError
from .manifest import (
    LORA,
    EngineManifest,
    PlanEntry,
    check_onnx,
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


def lora_plans(engine_dir: Path, engine: EngineManifest) -> dict[str, PlanEntry]:
    """Return the variants that can be used with an engine, by the name of the plain block.

    Left out is what is older than its ONNX file or whose plan is gone. The digest is not looked
    at: `check_plan` does before anything is deserialized.
    """
    variants = variants_manifest(engine_dir / LORA, engine)
    found = {entry.block: entry for entry in variants.blocks} if variants else {}
    return {
        block: found[lora_variant(block)]
        for block in engine.expected_blocks
        if lora_variant(block) in found and is_usable(engine_dir, found[lora_variant(block)])
    }


def build_lora_plans(
    engine_dir: Path, blocks: Sequence[str], progress: Progress, workers: int = 1
) -> EngineManifest:
    """Build the variants of some blocks of a finished engine; those that exist are kept.

    Args:
        engine_dir: Folder with the engine's manifest; the ONNX files are in its parent.
        blocks: Names of plain blocks.
        progress: Called at least every 0.1 s while blocks are built; may raise to cancel.
        workers: Number of build processes.

    Raises:
        EngineVersionError: The engine was built with another library release.
        BlocksMissingError: A block was exported without its variant.
        EngineStaleError: A variant was exported from other weights than the engine's.
        EngineError: Any of the build errors; variants that were finished before are kept.
    """
    engine = load_manifest(engine_dir)
    backend = engine_backend(engine)
    total = len(blocks)
    with locked(engine_dir, lambda: progress("Waiting for another build of this engine", 0, total)):
        remove_temporaries(engine_dir)
        kept = lora_plans(engine_dir, engine)
        signatures = [
            _signature(engine_dir.parent, block, engine)
            for block in engine.expected_blocks
            if block in blocks or (block in kept and _onnx(engine_dir.parent, block).is_file())
        ]
        build = PlanBuild(engine_dir, engine.spec, backend, signatures, progress, LORA)
        jobs = build.reuse((LORA,))
        build_plans(jobs, workers, build.store, build.report)
        variants = build.manifest()
        write_manifest(engine_dir / LORA, variants)
    logger.info("Built %d plans for LoRA of %s", len(jobs), engine_dir.parent.name)
    return variants


def engine_backend(engine: EngineManifest) -> Backend:
    """Return the library for plans that run beside an engine's.

    Raises:
        EngineVersionError: The engine was built with another release.
    """
    backend = load_backend(engine.backend)
    if backend.version != engine.backend_version:
        raise EngineVersionError(engine.built_with, backend.label)
    return backend


def is_usable(engine_dir: Path, entry: PlanEntry) -> bool:
    """Tell whether a plan is there and not older than its ONNX file in the parent folder."""
    path = engine_dir / entry.file
    try:
        check_onnx(engine_dir, entry)
    except EngineStaleError:
        return False
    return path.is_file() and not path.is_symlink() and path.stat().st_size == entry.bytes


def _signature(folder: Path, block: str, engine: EngineManifest) -> BlockSignature:
    path = _onnx(folder, block)
    if not path.is_file():
        raise BlocksMissingError(folder, [lora_variant(block)])
    signature = read_signature(path)
    if signature.checkpoint_digest != engine.checkpoint_digest:
        raise EngineStaleError(path.name, "was exported from other weights than the engine's")
    return signature


def _onnx(folder: Path, block: str) -> Path:
    return folder / f"{lora_variant(block)}.onnx"
