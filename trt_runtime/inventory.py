"""Which engines lie beside a quantized checkpoint, and in which state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .backend import Gpu
from .bakes import BAKES, bake_folders
from .engine_state import EngineState, engine_state
from .in_use import is_in_use
from .last_use import last_used
from .manifest import MANIFEST, UNFINISHED, EngineManifest, plan_files
from .removal import bake_files, engine_files, plan_folders, size_of
from .store import is_locked

READY = "ready"


@dataclass(frozen=True)
class StoredEngine:
    """An engine, finished or not, as it lies on disk.

    Attributes:
        state: Whether it can run.
        plans: How many plan files there are.
        bytes: What they take.
        used: When it was used last, in seconds since 1970.
        is_being_built: Whether a process is building it.
        is_in_use: Whether a process has it open.
    """

    state: EngineState
    plans: int
    bytes: int
    used: float
    is_being_built: bool
    is_in_use: bool

    @property
    def name(self) -> str:
        """The name that nodes and commands show: checkpoint and target."""
        return f"{self.state.folder.parent.name}/{self.state.folder.name}"

    @property
    def manifest(self) -> EngineManifest | None:
        """What it was built for; None if that cannot be read."""
        return self.state.manifest

    @property
    def status(self) -> str:
        """``ready``, or why it cannot run."""
        return "being built" if self.is_being_built else self.state.fault or READY


def stored_engines(
    checkpoint_folder: Path, checkpoint_digest: str | None, gpu: Gpu | None = None
) -> list[StoredEngine]:
    """List the engines of a quantized checkpoint; links are followed, as ComfyUI does.

    Args:
        checkpoint_folder: Holds the engines.
        checkpoint_digest: Content digest of the checkpoint; None if it cannot be read.
        gpu: What they would run on; None does not ask for which GPU they are.
    """
    return [
        StoredEngine(
            engine_state(folder, checkpoint_digest, gpu),
            sum(1 for _ in plan_files(folder)),
            size_of(plan_files(folder)),
            last_used(folder),
            is_locked(folder),
            is_in_use(folder),
        )
        for folder in listed_engines(checkpoint_folder)
    ]


def bake_bytes(checkpoint_folder: Path) -> int:
    """Return what all baked LoRAs of a checkpoint take."""
    bakes = bake_folders(checkpoint_folder / BAKES)
    return size_of(file for bake in bakes for file in _files(bake))


def _files(bake: Path) -> Iterator[Path]:
    yield from bake_files(bake)
    for plans in plan_folders(bake):
        yield from engine_files(plans)


def listed_engines(checkpoint_folder: Path) -> list[Path]:
    """List the folders of engines, finished or not; links are followed, as ComfyUI does."""
    folders = sorted(checkpoint_folder.iterdir())
    return [f for f in folders if (f / MANIFEST).is_file() or (f / UNFINISHED).is_file()]
