"""Whether an engine can run, told without opening a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .backend import Gpu, load_backend
from .errors.backend import BackendMissingError, EngineVersionError
from .errors.engine import (
    EngineStaleError,
    ManifestInvalidError,
    ManifestMissingError,
    PlanMissingError,
    PlanTruncatedError,
)
from .manifest import EngineManifest, check_engine, load_manifest, plan_files


@dataclass(frozen=True)
class EngineState:
    """An engine as it lies on disk.

    Attributes:
        folder: Of the plans.
        manifest: None if there is none that can be read.
        fault: Why it cannot run; empty if nothing speaks against it.
        is_stale: It will never run as it is: only another build helps.
    """

    folder: Path
    manifest: EngineManifest | None
    fault: str = ""
    is_stale: bool = False


def engine_state(
    engine_dir: Path, checkpoint_digest: str | None, gpu: Gpu | None = None
) -> EngineState:
    """Return the state of an engine.

    Args:
        engine_dir: Folder of the plans.
        checkpoint_digest: Content digest of the quantized checkpoint beside it; None if unknown.
        gpu: What it would run on; None does not ask for which GPU it is.
    """
    try:
        manifest = load_manifest(engine_dir)
    except ManifestMissingError as error:
        fault = "unfinished build" if error.unfinished else "no manifest"
        return EngineState(engine_dir, None, f"{fault}: {error.plans} plans")
    except ManifestInvalidError as error:
        fault = f"manifest refused: field '{error.field}': {error.problem}"
        return EngineState(engine_dir, None, fault, any(plan_files(engine_dir)))
    if checkpoint_digest is not None and manifest.checkpoint_digest != checkpoint_digest:
        return EngineState(engine_dir, manifest, "quantized again after the build", True)
    state = _checked(engine_dir, manifest)
    if state.fault or gpu is None or gpu.problem or gpu.sm in manifest.targets:
        return state
    # for another machine it may be just right: that is not stale
    targets = " and ".join(target.upper() for target in manifest.targets)
    fault = f"other target: built for {targets}, this GPU is {gpu.sm.upper()} ({gpu.name})"
    return EngineState(engine_dir, manifest, fault)


def _checked(engine_dir: Path, manifest: EngineManifest) -> EngineState:
    try:
        check_engine(engine_dir, manifest, load_backend(manifest.backend))
    except BackendMissingError as error:
        fault = f"built with {manifest.built_with}, but {error.package!r} does not import here"
        return EngineState(engine_dir, manifest, fault)
    except EngineVersionError as error:
        fault = f"library updated: built with {error.built_with}, installed is {error.installed}"
    except EngineStaleError:
        fault = "exported again after the build"
    except PlanMissingError as error:
        fault = f"plan missing: {error.file}"
    except PlanTruncatedError as error:
        fault = f"plan damaged: {error.file} {error.problem}"
    else:
        return EngineState(engine_dir, manifest)
    return EngineState(engine_dir, manifest, fault, is_stale=True)
