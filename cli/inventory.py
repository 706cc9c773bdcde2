"""What lies in the models folders and in which state, as plain data for tables and JSON."""

from __future__ import annotations

from typing import Any

from ..quant.inventory import StoredCheckpoint, stored_checkpoints
from ..quant.leftovers import unfinished_checkpoints
from ..quant.model_folders import ModelFolders
from ..trt_runtime.inventory import READY, StoredEngine, stored_engines


def inventory(folders: ModelFolders) -> dict[str, Any]:
    """Return every quantized checkpoint with its engines, and quantizations to be gone on with."""
    return {
        "models": [str(root) for root in folders.roots],
        "checkpoints": [_checkpoint(stored) for stored in stored_checkpoints(folders)],
        "unfinished": [str(path) for path in unfinished_checkpoints(folders)],
    }


def _checkpoint(stored: StoredCheckpoint) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": stored.name, "bytes": stored.bytes}
    entry["state"] = f"refused: {stored.fault}" if stored.fault else READY
    if stored.metadata is not None:
        entry |= {
            "variant": stored.metadata.variant,
            "recipe": stored.metadata.recipe,
            "source": stored.metadata.source_name,
            "exported": stored.is_exported,
        }
    engines = stored_engines(stored.folder, stored.content_digest)
    entry["engines"] = [_engine(engine) for engine in engines]
    return entry


def _engine(stored: StoredEngine) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": stored.name,
        "state": stored.status,
        "in_use": stored.is_in_use,
        "plans": stored.plans,
        "bytes": stored.bytes,
        "used": stored.used,
    }
    manifest = stored.manifest
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
