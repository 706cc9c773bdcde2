"""What lies in the model folders: as tables, checked, built again, and deleted."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import comfy.model_management

from ..quant.inventory import StoredCheckpoint, stored_checkpoints
from ..quant.leftovers import Leftover, find_leftovers, statistics_bytes, unfinished_checkpoints
from ..quant.model_folders import ModelFolders, checkpoint_file
from ..trt_runtime.backend import probe_gpu
from ..trt_runtime.cleanup import UNUSED_SECONDS, Finding, find_in_store
from ..trt_runtime.errors import EngineError
from ..trt_runtime.errors.storage import EngineBusyError
from ..trt_runtime.inventory import READY, StoredEngine, bake_bytes, stored_engines

if TYPE_CHECKING:
    from ..trt_runtime.rebuild import Rebuilt
    from .progress import NodeProgress

Findings: TypeAlias = Sequence[Finding | Leftover]


def listing(folders: ModelFolders, only: Path | None, findings: Findings) -> str:
    """Return checkpoints, engines, what they take, and what of it is not needed.

    Args:
        folders: Where to look.
        only: Folder of the one engine to show; None shows all.
        findings: What is not needed.
    """
    checkpoints = _checkpoints(folders, only)
    gpu = probe_gpu(comfy.model_management.get_torch_device())
    engines = [
        engine
        for stored in checkpoints
        for engine in stored_engines(stored.folder, stored.content_digest, gpu)
    ]
    shown = [engine for engine in engines if only is None or engine.state.folder == only]
    sections = [
        _checkpoint_table(checkpoints),
        _engine_table(shown),
        "\n".join(f"unfinished quantization: {path}" for path in unfinished_checkpoints(folders)),
        "\n".join(_totals(folders, checkpoints, engines)),
        _finding_table(findings),
    ]
    return "\n\n".join(section for section in sections if section)


def find_unneeded(folders: ModelFolders, only: Path | None, quota: int | None) -> Findings:
    """Find what can go; nothing is deleted.

    Args:
        folders: Where to look.
        only: Folder of an engine: nothing outside of it is found.
        quota: Bytes that engines and bakes may take; None is no limit.
    """
    # an engine that no workflow holds any more is still marked until its cycle is found
    gc.collect()
    now = time.time()
    digests = {stored.folder: stored.content_digest for stored in stored_checkpoints(folders)}
    engines = find_in_store(digests, now - UNUSED_SECONDS, quota)
    if only is not None:
        return [finding for finding in engines if only in (finding.path, *finding.path.parents)]
    return [*engines, *find_leftovers(folders, now)]


def deleted(findings: Findings, shown: Collection[Path], progress: NodeProgress) -> str:
    """Delete what was shown and is still not needed; return what was freed.

    Args:
        findings: What is not needed now.
        shown: What the user has seen; nothing else is deleted.
        progress: Called before each deletion; may raise to cancel.
    """
    removable = [finding for finding in findings if finding.remove is not None]
    wanted = [finding for finding in removable if finding.path in shown]
    lines, freed = [], 0
    for done, finding in enumerate(wanted):
        progress(f"Deleting {finding.path.name}", done, len(wanted))
        try:
            size = finding.remove() if finding.remove else 0
        except EngineBusyError as error:
            lines.append(str(error))
            continue
        freed += size
        lines.append(f"deleted: {finding.kind} {finding.path}, {_size(size)}")
    lines.append(f"{_size(freed)} are free again." if wanted else "Nothing was left to delete.")
    if len(removable) > len(wanted):
        lines.append(f"{len(removable) - len(wanted)} more can go now: list them first.")
    return "\n".join(lines)


def verified(folders: ModelFolders, only: Path | None, progress: NodeProgress) -> str:
    """Read every plan and checkpoint; return a line for each: whether it is as recorded."""
    return "\n".join(
        line for stored in _checkpoints(folders, only) for line in _verified(stored, only, progress)
    )


def rebuild_stale(
    folders: ModelFolders, only: Path | None, progress: NodeProgress
) -> list[Rebuilt]:
    """Export and build what is stale; one engine that cannot be built keeps no other from it."""
    from ..quant.onnx_export import export_missing
    from ..trt_runtime.rebuild import rebuild_stale

    wanted = None if only is None else [only]
    results = []
    for stored in _checkpoints(folders, only):
        export = partial(export_missing, checkpoint_file(stored.folder), progress)
        results += rebuild_stale(stored.folder, stored.content_digest, export, progress, wanted)
    return results


def _checkpoints(folders: ModelFolders, only: Path | None) -> list[StoredCheckpoint]:
    found = stored_checkpoints(folders)
    return [stored for stored in found if only is None or stored.folder == only.parent]


def _verified(stored: StoredCheckpoint, only: Path | None, progress: NodeProgress) -> Iterator[str]:
    from ..quant.content_digest import check_content
    from ..quant.errors.files import QuantizedCheckpointError
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from ..trt_runtime.engine_verification import verify_everything

    try:
        check_content(QuantizedCheckpoint.read(checkpoint_file(stored.folder)), progress)
        yield f"{stored.name}: all tensors as recorded"
    except QuantizedCheckpointError as error:
        yield f"{stored.name}: FAULT: {error}"
    for engine in stored_engines(stored.folder, stored.content_digest):
        if only not in (None, engine.state.folder):
            continue
        try:
            found = verify_everything(engine.state.folder, stored.content_digest, progress)
        except EngineError as error:
            yield f"{engine.name}: FAULT: {error}"
            continue
        yield from (f"{engine.name}: FAULT: {fault}" for fault in found.faults)
        if not found.faults:
            yield f"{engine.name}: {found.plans} plans as recorded"


def _checkpoint_table(checkpoints: Sequence[StoredCheckpoint]) -> str:
    if not checkpoints:
        return "No quantized checkpoint yet. 'Quantize FLUX to FP4' makes one."
    rows = [("checkpoint", "model", "recipe", "size", "ONNX", "state")]
    for stored in checkpoints:
        metadata = stored.metadata
        rows.append(
            (
                stored.name,
                metadata.variant if metadata else "",
                metadata.recipe if metadata else "",
                _size(stored.bytes),
                "yes" if stored.is_exported else "no",
                f"refused: {stored.fault}" if stored.fault else READY,
            )
        )
    return _table(rows)


def _engine_table(engines: Sequence[StoredEngine]) -> str:
    if not engines:
        return "No engine yet. 'Build TensorRT Engine' makes one."
    rows = [("engine", "recipe", "up to", "built with", "size", "last use", "state")]
    for engine in engines:
        manifest, limits = engine.manifest, ""
        if manifest is not None:
            profile = manifest.profile
            limits = (
                f"{profile.max_img_tokens} image, {profile.max_txt_tokens} text tokens, "
                f"batch {profile.max_batch}"
            )
        rows.append(
            (
                engine.name,
                manifest.recipe if manifest else "",
                limits,
                manifest.built_with if manifest else "",
                _size(engine.bytes),
                _day(engine.used),
                _state(engine),
            )
        )
    return _table(rows)


def _state(engine: StoredEngine) -> str:
    stale = "stale: " if engine.state.is_stale else ""
    return f"{stale}{engine.status}{' (open)' if engine.is_in_use else ''}"


def _totals(
    folders: ModelFolders,
    checkpoints: Sequence[StoredCheckpoint],
    engines: Sequence[StoredEngine],
) -> Iterator[str]:
    kinds = {
        "quantized checkpoints": sum(stored.bytes for stored in checkpoints),
        "engines": sum(engine.bytes for engine in engines),
        "baked LoRAs": sum(bake_bytes(stored.folder) for stored in checkpoints),
        "calibration statistics": statistics_bytes(folders),
    }
    yield "on disk: " + ", ".join(f"{kind} {_size(size)}" for kind, size in kinds.items())
    for root in folders.roots:
        if root.is_dir():
            yield f"{_size(shutil.disk_usage(root).free)} free in {root}"


def _finding_table(findings: Findings) -> str:
    if not findings:
        return "Everything is needed."
    rows = [("not needed", "where", "size", "last use", "why")]
    for finding in findings:
        reported = "" if finding.remove else " (stays)"
        place = f"{finding.path.parent.name}/{finding.path.name}"
        why = f"{finding.reason}{reported}"
        rows.append((finding.kind, place, _size(finding.bytes), _day(finding.used), why))
    total = sum(finding.bytes for finding in findings if finding.remove)
    return f"{_table(rows)}\n{_size(total)} can go: 'collect garbage' deletes it."


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
