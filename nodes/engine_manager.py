"""Node: all engines and what they take; rebuilding, checking and cleaning up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from . import paths
from .engine_labels import engine_labels
from .errors import NothingShownError, RebuildError
from .failures import told
from .schema import CATEGORY, description

if TYPE_CHECKING:
    from .progress import NodeProgress
    from .store import Findings

LIST, REBUILD, VERIFY, COLLECT = "list", "rebuild stale", "verify", "collect garbage"
ALL = "all"


class ShownFindings:
    """What each node has shown as not needed; nothing else is ever deleted, and that only once.

    A workflow of a stranger, or one that is queued a second time, deletes nothing that the user has
    not seen.
    """

    def __init__(self) -> None:
        self._shown: dict[str, set[Path]] = {}
        self._lists: dict[str, int] = {}

    def record(self, node_id: str, findings: Findings) -> None:
        """Note what a node shows."""
        self._shown[node_id] = {finding.path for finding in findings}
        self._lists[node_id] = self.lists(node_id) + 1

    def take(self, node_id: str) -> set[Path]:
        """Return what a node has shown last, for deleting it.

        Raises:
            NothingShownError: It has shown nothing since the last time, or since the start.
        """
        if node_id not in self._shown:
            raise NothingShownError(COLLECT, LIST)
        return self._shown.pop(node_id)

    def lists(self, node_id: str) -> int:
        """Return how often a node has shown something."""
        return self._lists.get(node_id, 0)


class EngineManager(io.ComfyNode):
    """Shows all quantized checkpoints and engines with their state, what takes room, and what is
    not needed. Can build stale engines again, check every file against its digest, and delete what
    was listed as not needed. Quantized checkpoints are never deleted."""

    shown = ShownFindings()

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4EngineManager",
            display_name="FLUX FP4 Engine Manager",
            category=CATEGORY,
            description=description(EngineManager),
            search_aliases=["fp4", "nvfp4", "tensorrt", "rebuild", "disk space", "cleanup", "gc"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "action",
                    options=[LIST, REBUILD, VERIFY, COLLECT],
                    default=LIST,
                    tooltip=f"{LIST}: change nothing. {REBUILD}: build engines again that an "
                    "update or a new export has made unusable, for what they were built for. "
                    f"{VERIFY}: read every plan and checkpoint. {COLLECT}: delete what the {LIST} "
                    "of this node showed before.",
                ),
                io.Combo.Input(
                    "engine",
                    options=[ALL, *paths.engines()],
                    extra_dict=engine_labels(),
                    default=ALL,
                    optional=True,
                    advanced=True,
                    tooltip="Only this engine, or all.",
                ),
                io.Float.Input(
                    "quota",
                    display_name="quota GB",
                    default=0.0,
                    min=0.0,
                    max=100_000.0,
                    step=1.0,
                    optional=True,
                    advanced=True,
                    tooltip="What engines and baked LoRAs may take on disk. Those that were used "
                    f"longest ago count as not needed until the others fit. 0 is no limit. {LIST} "
                    "shows them first.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The report as plain text.")],
        )

    @classmethod
    def fingerprint_inputs(cls, action: str | None, **_options: Any) -> float | int:
        # What lies on disk changes at any time: look again in every run. Deleting is not repeated
        # by queueing again; only another look at what would go makes it possible once more.
        return cls.shown.lists(cls.hidden.unique_id) if action == COLLECT else float("nan")

    @classmethod
    @told
    def execute(cls, action: str, engine: str = ALL, quota: float = 0.0) -> io.NodeOutput:
        from .progress import NodeProgress

        progress = NodeProgress(cls.hidden.unique_id)
        only = None if engine == ALL else paths.engine_folder(engine)
        text = cls._done(action, only, round(quota * 1e9) or None, progress)
        progress.show(text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))

    @classmethod
    def _done(
        cls, action: str, only: Path | None, quota: int | None, progress: NodeProgress
    ) -> str:
        from . import store

        folders = paths.model_folders()
        if action == VERIFY:
            return store.verified(folders, only, progress)
        if action == COLLECT:
            shown = cls.shown.take(cls.hidden.unique_id)
            findings = store.find_unneeded(folders, only, quota)
            return store.deleted(findings, shown, progress)
        head = ""
        if action == REBUILD:
            head = _rebuilt_report(store.rebuild_stale(folders, only, progress))
        findings = store.find_unneeded(folders, only, quota)
        cls.shown.record(cls.hidden.unique_id, findings)
        return head + store.listing(folders, only, findings)


def _rebuilt_report(results: Sequence[Any]) -> str:
    """Say what was built.

    Raises:
        RebuildError: An engine could not be built.
    """
    built = [result.name for result in results if not result.fault]
    faults = {result.name: result.fault for result in results if result.fault}
    if faults:
        raise RebuildError(built, faults)
    if not results:
        return "No engine is stale.\n\n"
    lines = [f"{result.name} was built again: {result.reason}" for result in results]
    return "\n".join(lines) + "\n\n"
