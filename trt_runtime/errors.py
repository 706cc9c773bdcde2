"""Errors of the runtime: each carries its fields and builds the sentence that the user reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

BUILD_NODE = '"Build TensorRT Engine"'
EXPORT_NODE = '"Export FLUX FP4 to ONNX"'
REBUILD = (
    'Set "if stale" of "Load FLUX FP4 Engine" to "rebuild" and queue again, or run "FLUX FP4 '
    'Engine Manager" with "rebuild stale" for all engines.'
)
"""The shortest way from a stale engine to one that runs."""

OUT_OF_MEMORY = "killed for want of memory"


class EngineError(Exception):
    """Anything that building, checking, loading or running an engine refuses."""


class BackendMissingError(EngineError):
    """The library of a backend is not installed or does not load."""

    def __init__(self, backend: str, package: str, reason: str) -> None:
        self.backend, self.package, self.reason = backend, package, reason
        super().__init__(
            f"Backend '{backend}' needs the Python package '{package}', which does not import here "
            f"({reason}). Install it into ComfyUI's Python with: "
            f"python -m pip install {package!r}"
        )


class BackendUnusableError(EngineError):
    """A backend was asked for by name on a machine that cannot run it."""

    def __init__(self, backend: str, reason: str) -> None:
        self.backend, self.reason = backend, reason
        super().__init__(
            f"Backend '{backend}' cannot run here: {reason}. "
            'Choose backend "auto" or "reference" to run on the CPU.'
        )


class BuildSpecError(EngineError, ValueError):
    """A target, a profile or a worker count that cannot be built."""


class FormatTargetError(BuildSpecError):
    """A target whose tensor cores cannot multiply a format of the checkpoint."""

    def __init__(self, target: str, what: str, needs: str, instead: str) -> None:
        self.target, self.what, self.needs, self.instead = target, what, needs, instead
        super().__init__(
            f"Target '{target}' cannot run {what}: that needs {needs}. Choose such a target, or "
            f'{instead} in "Quantize FLUX to FP4".'
        )


class ShapeProfileError(EngineError):
    """Token counts outside the range that an engine was built for."""

    def __init__(self, label: str, tokens: int, minimum: int, maximum: int, widget: str) -> None:
        self.label, self.tokens, self.minimum, self.maximum = label, tokens, minimum, maximum
        self.widget = widget
        smaller, bound = ("fewer", "max") if tokens > maximum else ("more", "min")
        super().__init__(
            f"This run needs {tokens} {label} tokens; the engine takes {minimum} to {maximum}. "
            f'Use {smaller}, or build again with {BUILD_NODE} and another "{bound} {widget}".'
        )


class BlockContractError(EngineError):
    """An ONNX file that is not a block this runtime can trust."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path, self.problem = path, problem
        super().__init__(
            f"'{path.name}' is not a usable block ONNX: {problem}. "
            f"Export it again with {EXPORT_NODE}."
        )


class BlocksMissingError(EngineError):
    """A folder that does not hold all blocks of one model."""

    def __init__(self, folder: Path, missing: Sequence[str]) -> None:
        self.folder, self.missing = folder, tuple(missing)
        super().__init__(
            f"Folder '{folder.name}' lacks {len(self.missing)} block ONNX files (first: "
            f"'{self.missing[0]}.onnx'). Export the checkpoint again with {EXPORT_NODE}."
        )


class BlocksMixedError(EngineError):
    """Block files of one folder that come from different exports."""

    def __init__(self, folder: Path, problem: str) -> None:
        self.folder, self.problem = folder, problem
        super().__init__(
            f"The block ONNX files in '{folder.name}' do not belong together: {problem}. "
            f"Export the checkpoint again with {EXPORT_NODE}."
        )


class StorageError(EngineError):
    """A file could not be written; nothing incomplete with its final name was left."""


class DiskFullError(StorageError):
    """A file did not fit."""

    def __init__(self, path: Path, needed_bytes: int, free_bytes: int) -> None:
        self.path, self.needed_bytes, self.free_bytes = path, needed_bytes, free_bytes
        super().__init__(
            f"'{path.name}' needs {needed_bytes} bytes, but the disk takes no more "
            f"({free_bytes} bytes free in '{path.parent.name}'). Free some space and run the step "
            "again; finished blocks are kept."
        )


class FileWriteError(StorageError):
    """The system refused to write for another reason than a full disk."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(
            f"'{path.name}' cannot be written into the folder '{path.parent.name}': {reason}. "
            "Check that ComfyUI may write there and that the disk is in order, then run the step "
            "again; finished blocks are kept."
        )


class EngineBusyError(EngineError):
    """Another process is building in a folder that was to be changed."""

    state, remedy = "is being built by another process", "wait until that is done"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(
            f"'{folder.parent.name}/{folder.name}' {self.state}. Nothing was changed; "
            f"{self.remedy} and try again."
        )


class EngineInUseError(EngineBusyError):
    """A process has an engine or a bake open that was to be deleted."""

    state = "is open in a running ComfyUI"
    remedy = "press 'Free model and node cache' there, or close it,"


class PlanBuildError(EngineError):
    """TensorRT refused a block."""

    def __init__(self, block: str, messages: Sequence[str]) -> None:
        self.block, self.messages = block, tuple(messages)
        super().__init__(
            f"TensorRT cannot build block '{block}': {'; '.join(messages) or 'no reason given'}. "
            f"If the ONNX files are older than this version of the pack, run {EXPORT_NODE} again."
        )


class EngineLintError(EngineError):
    """A plan that would not run in its formats: it built, but it is not what was asked for."""

    def __init__(self, block: str, problems: dict[str, str]) -> None:
        self.block, self.problems = block, dict(problems)
        listed = "; ".join(f"{linear}: {problem}" for linear, problem in problems.items())
        super().__init__(
            f"Block '{block}' lost its precision in the build ({listed}). The plan was not stored. "
            f"Quantize and export the block again, or report the TensorRT version."
        )

    @property
    def linears(self) -> tuple[str, ...]:
        """What lost its precision: Linears, or "attention"."""
        return tuple(self.problems)


class WorkerDiedError(EngineError):
    """The process of a block was lost, and so was the second one, which ran alone."""

    def __init__(self, block: str, first_cause: str, cause: str, log_tail: Sequence[str]) -> None:
        self.block, self.first_cause, self.cause = block, first_cause, cause
        self.log_tail = tuple(log_tail)
        tail = " | ".join(self.log_tail) or "no output"
        memory = OUT_OF_MEMORY in first_cause + cause
        remedy = "Close other programs or lower 'workers', then run" if memory else "Run"
        super().__init__(
            f"Block '{block}' cannot be built: the build process was lost ({first_cause}), and "
            f"again when it ran alone ({cause}). Last output: {tail}. {remedy} {BUILD_NODE} "
            "again; finished blocks are kept."
        )


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
        self.path, self.field, self.problem = path, field, problem
        super().__init__(
            f"'{path.parent.name}/{path.name}' is refused: field '{field}': {problem}. "
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


class EngineVersionError(EngineError):
    """Plans of another library or release: they never run on this one."""

    def __init__(self, built_with: str, installed: str) -> None:
        self.built_with, self.installed = built_with, installed
        super().__init__(
            f"The engine was built with {built_with}; installed is {installed}, and plans do not "
            f"move between releases. {REBUILD}"
        )


class EngineTargetError(EngineError):
    """Plans for another GPU generation."""

    def __init__(self, gpu: str, sm: str, targets: Sequence[str]) -> None:
        self.gpu, self.sm, self.targets = gpu, sm, tuple(targets)
        super().__init__(
            f"The engine targets {', '.join(t.upper() for t in targets)}; this GPU is {sm.upper()} "
            f"({gpu}). Build it for this GPU with {BUILD_NODE}."
        )


class BlockInputError(EngineError):
    """Inputs that do not match a block's signature."""

    def __init__(self, block: str, problem: str) -> None:
        self.block, self.problem = block, problem
        super().__init__(f"Block '{block}' cannot run: {problem}.")


class AdapterError(EngineError):
    """Low-rank factors that do not fit a Linear."""

    def __init__(self, block: str, linear: str, problem: str) -> None:
        self.block, self.linear, self.problem = block, linear, problem
        super().__init__(f"The adapter for '{block}.{linear}' cannot be used: {problem}.")


class VariantPlanMissingError(EngineError):
    """Forms of blocks that have no plan, or none that belongs to this engine."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(
            f"{len(self.names)} plans for LoRA or attention masks are missing (first: "
            f"'{self.names[0]}'). Queue the workflow again to build them."
        )


class EngineNotLoadedError(EngineError):
    """A run before load() or after unload()."""

    def __init__(self, block: str) -> None:
        self.block = block
        super().__init__(f"Block '{block}' cannot run: the engine is not loaded. Load it first.")


class SelfTestError(EngineError):
    """A block computes something else on this GPU than its ONNX file says."""

    def __init__(self, block: str, db: float, limit_db: float, report: Path) -> None:
        self.block, self.db, self.limit_db, self.report = block, db, limit_db, report
        found = f"{db:.1f} dB" if db > -1000 else "values that are not finite"
        super().__init__(
            f"The engine is not used: on this GPU block '{block}' gives {found} against the "
            f"reference, at least {limit_db:.0f} dB are needed. Update the NVIDIA driver and "
            f"build again with {BUILD_NODE}. If it stays, report it with '{report.name}' from "
            'the engine\'s folder; until then choose backend "reference".'
        )


class PlanValidityError(EngineError):
    """TensorRT says itself that a plan does not run here."""

    def __init__(self, block: str, reasons: Sequence[str]) -> None:
        self.block, self.reasons = block, tuple(reasons)
        is_driver = {"OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "CUDA_ERROR"} & set(reasons)
        remedy = "Update the NVIDIA driver." if is_driver else f"Build it again with {BUILD_NODE}."
        super().__init__(
            f"TensorRT refuses the plan of block '{block}' on this machine: "
            f"{', '.join(reasons).lower().replace('_', ' ')}. "
            f"{remedy}"
        )


class ExecutionError(EngineError):
    """TensorRT refused to load or to run a verified plan."""

    def __init__(self, block: str, step: str, messages: Sequence[str]) -> None:
        self.block, self.step, self.messages = block, step, tuple(messages)
        super().__init__(
            f"TensorRT failed at block '{block}' in {step}: "
            f"{'; '.join(self.messages) or 'no reason given'}. "
            f"If it happens again, build the engine again with {BUILD_NODE}."
        )
