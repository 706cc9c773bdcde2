"""What lies in a models folder and in which state, as plain data for tables and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..quant.errors.files import QuantizedCheckpointError
from ..quant.leftovers import unfinished_checkpoints
from ..quant.model_folders import ModelFolders, checkpoint_file
from ..quant.quantized_checkpoint import QuantizedCheckpoint
from ..trt_runtime.engine_state import EngineState, engine_state
from ..trt_runtime.last_use import last_used
from ..trt_runtime.manifest import MANIFEST, UNFINISHED, plan_files
from ..trt_runtime.store import is_locked

READY = "ready"


def inventory(folders: ModelFolders) -> dict[str, Any]:
    """Return every quantized checkpoint with its engines, and quantizations to be gone on with."""
    return {
        "models": str(folders.roots[0]),
        "checkpoints": [_checkpoint(folder) for folder in sorted(folders.checkpoint_folders())],
        "unfinished": [str(path) for path in unfinished_checkpoints(folders)],
    }


def content_digest(folder: Path) -> str | None:
    """Return the content digest of a folder's checkpoint; None if it cannot be read."""
    try:
        return QuantizedCheckpoint.read(checkpoint_file(folder)).metadata.content_digest
    except QuantizedCheckpointError:
        return None


def _checkpoint(folder: Path) -> dict[str, Any]:
    path = checkpoint_file(folder)
    entry: dict[str, Any] = {"name": folder.name, "bytes": path.stat().st_size, "state": READY}
    digest = None
    try:
        metadata = QuantizedCheckpoint.read(path).metadata
    except QuantizedCheckpointError as error:
        entry["state"] = f"refused: {error.reason}"
    else:
        digest = metadata.content_digest
        entry |= {
            "variant": metadata.variant,
            "recipe": metadata.recipe,
            "source": metadata.source_name,
            "exported": any(folder.glob("*_blocks.0.onnx")),
        }
    entry["engines"] = [_engine(engine_state(path, digest)) for path in _engine_folders(folder)]
    return entry


def _engine_folders(folder: Path) -> list[Path]:
    """List finished and unfinished engines; links are followed, as ComfyUI does."""
    folders = sorted(folder.iterdir())
    return [f for f in folders if (f / MANIFEST).is_file() or (f / UNFINISHED).is_file()]


def _engine(state: EngineState) -> dict[str, Any]:
    folder, manifest = state.folder, state.manifest
    entry: dict[str, Any] = {
        "name": f"{folder.parent.name}/{folder.name}",
        "state": "being built" if is_locked(folder) else state.fault or READY,
        "plans": sum(1 for _ in plan_files(folder)),
        "bytes": sum(path.stat().st_size for path in plan_files(folder)),
        "used": last_used(folder),
    }
    if manifest is not None:
        profile = manifest.profile
        entry |= {
            "targets": list(manifest.targets),
            "built_with": manifest.built_with,
            "max_img_tokens": profile.max_img_tokens,
            "max_txt_tokens": profile.max_txt_tokens,
            "max_batch": profile.max_batch,
        }
    return entry
