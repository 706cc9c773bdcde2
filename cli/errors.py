"""The command line's own errors; the layers below bring theirs."""

from __future__ import annotations

from collections.abc import Sequence
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
            f"{name!r} cannot be the name of a file: {fault}. "
            "Use a plain name such as 'flux1-dev-nvfp4'."
        )


class NotFoundError(CommandError):
    """Nothing of that name lies in the models folders."""

    def __init__(self, kind: str, name: str, folders: Sequence[Path], next_step: str) -> None:
        self.kind, self.name, self.folders = kind, name, tuple(folders)
        self.next_step = next_step
        places = " or ".join(f"'{folder}'" for folder in folders)
        super().__init__(f"There is no {kind} {name!r} in {places}. {next_step}")


class OptionError(CommandError):
    """An option has a value outside its limits."""

    def __init__(self, option: str, problem: str) -> None:
        self.option, self.problem = option, problem
        super().__init__(f"Option {option} cannot be used: {problem}. See --help of the command.")


class OutdatedEngineError(CommandError):
    """The checkpoint of an engine was quantized again after the build."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        super().__init__(
            f"Engine {engine!r} was built before its checkpoint was quantized again. Run the "
            "commands `export` and `build` again."
        )


class StoppedError(CommandError):
    """The launcher of several processes stops this one."""

    def __init__(self, process: int) -> None:
        self.process = process
        super().__init__(
            f"Process {process} was told to stop, because another one ended or somebody asked for "
            "it; what the launcher prints says which. Run the same command again: it goes on "
            "after the last saved state."
        )
