"""Errors about building plans."""

from __future__ import annotations

from collections.abc import Sequence

from . import BUILD_NODE, EXPORT_NODE, EngineError

OUT_OF_MEMORY = "killed for want of memory"


class BuildSpecError(EngineError, ValueError):
    """A target, a profile or a worker count that cannot be built.

    It is a `ValueError` for a profile in a manifest, whose faults pydantic collects.

    Attributes:
        found: What was asked for.
        limit: What can be built.
        next_step: What to choose instead.
    """

    def __init__(self, found: str, limit: str, next_step: str) -> None:
        self.found, self.limit, self.next_step = found, limit, next_step
        super().__init__(f"{found}; {limit}. {next_step}")


class FormatTargetError(EngineError):
    """A target whose tensor cores cannot multiply a format of the checkpoint."""

    def __init__(self, target: str, what: str, needs: str, instead: str) -> None:
        self.target, self.what, self.needs, self.instead = target, what, needs, instead
        super().__init__(
            f"Target '{target}' cannot run {what}: that needs {needs}. Choose such a 'target', or "
            f"{instead} in 'Quantize FLUX to FP4'."
        )


class PlanBuildError(EngineError):
    """TensorRT refused a block."""

    def __init__(self, block: str, messages: Sequence[str]) -> None:
        self.block, self.messages = block, tuple(messages)
        super().__init__(
            f"TensorRT cannot build block '{block}': {'; '.join(messages) or 'no reason given'}. "
            f"Run {EXPORT_NODE} again, in case its files are older than this version of the pack; "
            "if it stays, report it with what the command `doctor` shows."
        )


class EngineLintError(EngineError):
    """A plan that would not run in its formats: it built, but it is not what was asked for."""

    def __init__(self, block: str, problems: dict[str, str]) -> None:
        self.block, self.problems = block, dict(problems)
        listed = "; ".join(f"{linear}: {problem}" for linear, problem in problems.items())
        super().__init__(
            f"Block '{block}' lost its precision in the build ({listed}). The plan was not stored. "
            f"Run {EXPORT_NODE} and {BUILD_NODE} again. If it stays, choose another 'recipe' in "
            "'Quantize FLUX to FP4', and report it with what the command `doctor` shows."
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
