"""Checks every digest that an engine's records name; reads all plans and weights once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .backend import load_backend
from .bakes import BAKES, bake_folders
from .digest import digest_of_ranges
from .errors import EngineError
from .errors.backend import BackendMissingError, EngineVersionError
from .errors.engine import EngineStaleError, ManifestInvalidError
from .manifest import (
    BAKED,
    VARIANTS,
    EngineManifest,
    PlanEntry,
    check_onnx,
    check_plan_digest,
    check_plan_size,
    load_manifest,
    read_manifest_file,
)
from .progress import Progress
from .signature import read_signature


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        plans: How many plans were looked at: the engine's own, variants and baked ones.
        faults: One sentence each; empty if all is as recorded.
    """

    plans: int
    faults: tuple[str, ...]


def verify_everything(
    engine_dir: Path, checkpoint_digest: str | None, progress: Progress
) -> Verification:
    """Check an engine with its variants and bakes against records, ONNX files and weights.

    Args:
        engine_dir: Folder with the manifest.
        checkpoint_digest: Content digest of the quantized checkpoint beside it; None if unknown.
        progress: Called before each plan; may raise to cancel.

    Raises:
        ManifestMissingError, ManifestInvalidError: The engine itself has no usable manifest.
    """
    engine = load_manifest(engine_dir)
    faults = list(_engine_faults(engine, checkpoint_digest))
    wanted = [(engine_dir, entry) for entry in engine.blocks]
    for path in _other_records(engine_dir):
        record, fault = _read(path)
        faults += [fault] if fault else []
        # what belongs to an earlier build is never used and built again when it is wanted
        if record is not None and record.is_variant_of(engine):
            wanted += [(path.parent, entry) for entry in record.blocks]
    for done, (folder, entry) in enumerate(wanted):
        progress(f"Verifying {entry.file}", done, len(wanted))
        faults += _plan_faults(folder, entry)
    progress("Verified", len(wanted), len(wanted))
    return Verification(len(wanted), tuple(faults))


def _read(record: Path) -> tuple[EngineManifest | None, str]:
    try:
        return read_manifest_file(record), ""
    except ManifestInvalidError as error:
        return None, str(error)


def _other_records(engine_dir: Path) -> list[Path]:
    bakes = bake_folders(engine_dir.parent / BAKES)
    records = [engine_dir / VARIANTS, *(bake / engine_dir.name / BAKED for bake in bakes)]
    return [path for path in records if path.is_file()]


def _engine_faults(engine: EngineManifest, checkpoint_digest: str | None) -> Iterator[str]:
    if checkpoint_digest not in (None, engine.checkpoint_digest):
        yield "The checkpoint was quantized again after the build. Export and build it again."
    try:
        backend = load_backend(engine.backend)
    except BackendMissingError as error:
        yield str(error)
        return
    if backend.version != engine.backend_version:
        yield str(EngineVersionError(engine.built_with, backend.label))


def _plan_faults(folder: Path, entry: PlanEntry) -> Iterator[str]:
    for check in (_check_sources, _check_plan):
        fault = _fault(check, folder, entry)
        if fault:
            yield f"{folder.parent.name}/{folder.name}: {fault}"


def _fault(check: Callable[[Path, PlanEntry], None], folder: Path, entry: PlanEntry) -> str:
    try:
        check(folder, entry)
    except EngineError as error:
        return str(error)
    return ""


def _check_sources(folder: Path, entry: PlanEntry) -> None:
    check_onnx(folder, entry)
    _check_weights(folder, entry)


def _check_plan(folder: Path, entry: PlanEntry) -> None:
    check_plan_size(folder, entry)
    check_plan_digest(folder, entry)


def _check_weights(folder: Path, entry: PlanEntry) -> None:
    """Raise when the bytes that the block's ONNX file points to are not those of the build."""
    onnx = folder.parent / f"{entry.block}.onnx"
    if not onnx.is_file():
        return
    signature = read_signature(onnx)
    if signature.weights is None:
        return
    ranges = [(place.offset, place.length) for place in signature.ranges]
    if digest_of_ranges(signature.weights, ranges) != entry.weights_digest:
        raise EngineStaleError(
            entry.file, f"was built from other bytes than those in '{signature.weights.name}' now"
        )
