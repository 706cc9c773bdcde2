"""Errors of distillation; each message says what, the limit, the next step."""

from __future__ import annotations

from . import QuantError


class TrainingPackageError(QuantError):
    """A package that only training needs is not installed.

    Attributes:
        package: What pip calls it.
        purpose: What needs it.
    """

    def __init__(self, package: str, purpose: str) -> None:
        self.package, self.purpose = package, purpose
        name = package.split(">")[0]
        super().__init__(
            f"{purpose} needs the package '{name}', which is not installed. Install it into "
            f"ComfyUI's Python with: python -m pip install '{package}'"
        )


class LaunchError(QuantError):
    """The processes were started in a way that would not train what was asked for.

    Attributes:
        found: How they were started.
        limit: Why that does not work.
        next_step: How to start them.
    """

    def __init__(self, found: str, limit: str, next_step: str) -> None:
        self.found, self.limit, self.next_step = found, limit, next_step
        super().__init__(f"Distillation cannot start: {found}; {limit}. {next_step}")


class ForeignRunError(QuantError):
    """An unfinished run of the same name was started with other inputs or options.

    Attributes:
        name: Of the checkpoint to be made.
        option: The first difference.
        stored: What the run was started with.
        asked: What is asked for now.
    """

    def __init__(self, name: str, option: str, stored: object, asked: object) -> None:
        self.name, self.option, self.stored, self.asked = name, option, stored, asked
        super().__init__(
            f"The unfinished distillation of '{name}' has {option} {stored}, now it is {asked}. "
            "Use the former value, choose another name, or add --restart to begin anew."
        )


class LossNotFiniteError(QuantError):
    """The loss of a step is NaN or infinite.

    Attributes:
        step: Counted from one.
        loss: Mean over the batch.
    """

    def __init__(self, step: int, loss: float) -> None:
        self.step, self.loss = step, loss
        super().__init__(
            f"The loss of step {step} is {loss}; a finite one is needed to go on. What was saved "
            "before is kept. Run it again with --restart and a lower --learning-rate."
        )


class ProcessLostError(QuantError):
    """A process of a distillation ended, and another one finds its connection closed.

    Attributes:
        process: The one that found it out.
        reason: What the communication library says.
    """

    def __init__(self, process: int, reason: str) -> None:
        self.process, self.reason = process, reason
        super().__init__(
            f"Process {process} lost its connection to another one, which failed or was killed "
            f"({reason.splitlines()[0]}); its own message, if it left one, is above. Run the same "
            "command again: it goes on after the last saved state."
        )


class NoGainError(QuantError):
    """The distilled model is not nearer to the original than before.

    Attributes:
        name: Of the checkpoint that was to be made.
        before_db: SQNR of the velocity for held-out prompts, before.
        after_db: Afterwards.
    """

    def __init__(self, name: str, before_db: float, after_db: float) -> None:
        self.name, self.before_db, self.after_db = name, before_db, after_db
        super().__init__(
            f"'{name}' was not written: for held-out prompts the distilled model predicts the "
            f"original's velocity at {after_db:.2f} dB, before it were {before_db:.2f} dB, and "
            "more is needed. Run it again with --restart and a lower --learning-rate, more --steps "
            "or samples with more prompts."
        )


class ForeignSourceError(QuantError):
    """The quantized checkpoint was not made from the given original.

    Attributes:
        quantized: Name of the quantized checkpoint.
        made_from: File name of its source.
        given: File name of the given one.
    """

    def __init__(self, quantized: str, made_from: str, given: str) -> None:
        self.quantized, self.made_from, self.given = quantized, made_from, given
        super().__init__(
            f"'{quantized}' was made from a file '{made_from}' that is not the given '{given}': "
            "their digests differ. Name the checkpoint that it was quantized from."
        )
