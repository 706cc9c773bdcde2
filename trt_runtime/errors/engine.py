"""Errors about an engine's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import BUILD_NODE, REBUILD, EngineError, shortened


class ManifestMissingError(EngineError):
    """A folder without a finished engine."""

    def __init__(self, engine_dir: Path, plans: int, unfinished: bool) -> None:
        self.engine_dir, self.plans, self.unfinished = engine_dir, plans, unfinished
        why = "its build did not finish" if unfinished else "it has no manifest.json"
        super().__init__(
            f"Engine '{engine_dir.parent.name}/{engine_dir.name}' cannot be loaded: {why} "
            f"({plans} plan files found, none was opened). Run {BUILD_NODE}; finished blocks are "
            "kept."
        )


class ManifestInvalidError(EngineError):
    """A manifest with a field that is not allowed."""

    def __init__(self, path: Path, field: str, problem: str) -> None:
        self.path, self.field, self.problem = path, shortened(field), shortened(problem)
        super().__init__(
            f"'{path.parent.name}/{path.name}' is refused: field '{self.field}': {self.problem}. "
            f"Was this engine built on this machine? Build it again with {BUILD_NODE}."
        )


class EngineMismatchError(EngineError):
    """A plan file that differs from its manifest, or a manifest that differs from its sources."""

    action = REBUILD

    def __init__(self, file: str, problem: str) -> None:
        self.file, self.problem = file, problem
        super().__init__(f"'{file}' {problem}. {self.action}")


class PlanMissingError(EngineMismatchError):
    """The manifest names a plan that is not there."""


class PlanTruncatedError(EngineMismatchError):
    """A plan with another number of bytes than the manifest says."""


class PlanDigestError(EngineMismatchError):
    """A plan with other content than the manifest says."""

    action = f"Was this engine built on this machine? Build it again with {BUILD_NODE}."


class EngineStaleError(EngineMismatchError):
    """The ONNX files changed after the engine was built."""


class VariantPlanMissingError(EngineError):
    """Forms of blocks that have no plan, or none that belongs to this engine."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(
            f"{len(self.names)} plans for LoRA or attention masks are missing (first: "
            f"'{self.names[0]}'). Queue the workflow again to build them."
        )
