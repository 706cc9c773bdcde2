"""The command line's own errors; the layers below bring theirs."""

from __future__ import annotations

from pathlib import Path


class CommandError(Exception):
    """Root of every error that a command raises on purpose."""


class ModelsFolderError(CommandError):
    """There is no folder to look for checkpoints in."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(
            f"{problem}. Name ComfyUI's folder models/flux_fp4, or another one, with --models DIR."
        )


class NameRefusedError(CommandError):
    """A name cannot become a folder below the models folder."""

    def __init__(self, name: str, fault: str) -> None:
        self.name, self.fault = name, fault
        super().__init__(
            f"{name!r} cannot be the name of an FP4 checkpoint: {fault}. "
            "Use a plain name such as 'flux1-dev-nvfp4'."
        )


class NotFoundError(CommandError):
    """Nothing of that name lies in the models folder."""

    def __init__(self, kind: str, name: str, folder: Path, next_step: str) -> None:
        self.kind, self.name, self.folder = kind, name, folder
        super().__init__(f"There is no {kind} {name!r} in '{folder}'. {next_step}")


class OptionError(CommandError):
    """An option has a value outside its limits."""

    def __init__(self, option: str, problem: str) -> None:
        self.option, self.problem = option, problem
        super().__init__(f"Option {option} cannot be used: {problem}. See --help of the command.")


class StoppedError(CommandError):
    """The launcher of several processes stops this one."""

    def __init__(self, process: int) -> None:
        self.process = process
        super().__init__(
            f"Process {process} was told to stop, because another one ended or somebody asked for "
            "it; what the launcher prints says which. The same command goes on after the last "
            "saved state."
        )
