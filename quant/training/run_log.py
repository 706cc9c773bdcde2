"""What a distillation measures as it goes: a file of JSON lines, and a tracker if there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..whole_files import storing, whole_file

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG = "log.jsonl"


class RunLog:
    """The log of one run, written by the first process."""

    def __init__(self, folder: Path, accelerator: Accelerator, done: int) -> None:
        """Forget what an interrupted run noted behind the state that is gone on with.

        Args:
            folder: Of the run; exists.
            accelerator: With its trackers started, if it has any.
            done: Steps behind that state.
        """
        self._path, self._accelerator, self._done = folder / LOG, accelerator, done
        if accelerator.is_main_process:
            kept = [line for line in _lines(self._path) if json.loads(line)["step"] <= done]
            with whole_file(self._path) as file:
                file.writelines(kept)

    def measured(self, value: str) -> dict[int, float]:
        """Return what was noted of one kind of value, by the steps before it; empty without a log.

        Every process reads the same, whatever the first one is writing meanwhile.
        """
        entries = (json.loads(line) for line in _lines(self._path))
        kept = (entry for entry in entries if value in entry and entry["step"] <= self._done)
        return {entry["step"]: float(entry[value]) for entry in kept}

    def add(self, step: int, **values: float) -> None:
        """Note what was measured after some steps.

        Raises:
            DiskFullError, FileWriteError: The system refuses to write.
        """
        if self._accelerator.is_main_process:
            line = json.dumps({"step": step, **values}) + "\n"
            with storing(self._path), self._path.open("ab") as file:
                file.write(line.encode())
        self._accelerator.log(values, step=step)


def _lines(path: Path) -> list[bytes]:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    # a killed process may have left half a line
    return [line for line in lines if line.endswith(b"\n")]
