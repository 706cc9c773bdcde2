"""What a picker says of an engine: told in milliseconds, without a library and without a digest."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from .errors.engine import (
    ManifestInvalidError,
    ManifestMissingError,
    PlanMissingError,
    PlanTruncatedError,
)
from .manifest import EngineManifest, check_plan_size, load_manifest

UP_TO_DATE = "up to date"


def freshness(engine_dir: Path, checkpoint_digest: str) -> str:
    """Return what speaks against an engine at first sight; ``up to date`` if nothing does.

    ``engine_state`` finds more, and reads every ONNX file for it. Nothing of a file's own text is
    returned: these words are shown by a browser.

    Args:
        engine_dir: Folder of the plans.
        checkpoint_digest: Content digest of the quantized checkpoint beside it.
    """
    try:
        manifest = load_manifest(engine_dir)
        for entry in manifest.blocks:
            check_plan_size(engine_dir, entry)
    except ManifestMissingError:
        return "unfinished"
    except ManifestInvalidError:
        return "manifest refused"
    except (PlanMissingError, PlanTruncatedError):
        return "plans missing or damaged"
    if manifest.checkpoint_digest != checkpoint_digest:
        return "quantized again after the build"
    return UP_TO_DATE if _installed(manifest) else "built with another library version"


def _installed(manifest: EngineManifest) -> bool:
    """Tell whether the engine's library is the installed one, as far as pip knows."""
    try:
        return importlib.metadata.version(manifest.backend) == manifest.backend_version
    except importlib.metadata.PackageNotFoundError:
        # installed by other means, such as a wheel under NVIDIA's names for one CUDA version:
        # only importing it would tell
        return True
