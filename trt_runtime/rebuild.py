"""Building stale engines again for what their manifests say they are for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from .builder import build_engine
from .engine_state import EngineState, engine_state
from .errors import BUILD_NODE, EngineError
from .errors.storage import StorageError
from .inventory import listed_engines
from .progress import Progress
from .resources import AUTOMATIC

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rebuilt:
    """What became of one stale engine.

    Attributes:
        folder: Of its plans.
        reason: Why it was stale.
        fault: Why it still is; empty if it was built.
    """

    folder: Path
    reason: str
    fault: str = ""

    @property
    def name(self) -> str:
        """Checkpoint and target."""
        return f"{self.folder.parent.name}/{self.folder.name}"


def stale_engines(checkpoint_folder: Path, checkpoint_digest: str | None) -> list[EngineState]:
    """Return the engines of a checkpoint that only another build helps."""
    states = (engine_state(f, checkpoint_digest) for f in listed_engines(checkpoint_folder))
    return [state for state in states if state.is_stale]


def rebuild_stale(
    checkpoint_folder: Path,
    checkpoint_digest: str | None,
    export: Callable[[], object],
    progress: Progress,
    only: Collection[Path] | None = None,
) -> list[Rebuilt]:
    """Build the stale engines of one checkpoint again; plans that did not change are reused.

    Args:
        checkpoint_folder: Holds the engines.
        checkpoint_digest: Content digest of the checkpoint; None if it cannot be read.
        export: Brings the ONNX files up to date; called once, and only if an engine is stale.
        progress: Called at least every 0.1 s while blocks are built; may raise to cancel.
        only: Folders of the engines that are wanted; None wants all.

    Returns:
        One entry for each stale engine. One that cannot be built keeps no other from it.

    Raises:
        StorageError: The disk takes no more; finished blocks are kept.
    """
    stale = [
        state
        for state in stale_engines(checkpoint_folder, checkpoint_digest)
        if only is None or state.folder in only
    ]
    if stale:
        export()
    return [_rebuilt(state, progress) for state in stale]


def _rebuilt(state: EngineState, progress: Progress) -> Rebuilt:
    if state.manifest is None:
        # what it was for is unknown
        fault = f"{state.fault}. Build it with {BUILD_NODE}."
        return Rebuilt(state.folder, state.fault, fault)
    spec = state.manifest.spec
    if spec.folder_name != state.folder.name:
        fault = f"its manifest is that of '{spec.folder_name}'"
        return Rebuilt(state.folder, state.fault, fault)
    logger.info("Engine %s is built again: %s", state.folder, state.fault)
    try:
        build_engine(state.folder.parent, spec, progress, AUTOMATIC)
    except StorageError:
        raise
    except EngineError as error:
        return Rebuilt(state.folder, state.fault, str(error))
    return Rebuilt(state.folder, state.fault)
