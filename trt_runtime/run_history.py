"""How long pieces of work took on this machine: what later runs are estimated by.

One small JSON file per machine, because models folders are shared over networks. It is a cache:
damaged, it is begun anew, and where it cannot be written the work itself goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .digest import digest_of_fields
from .errors.storage import StorageError
from .progress import Record
from .store import storing, write_atomic

logger = logging.getLogger(__name__)

KEPT_RUNS = 64
"""By kind of work: all blocks of one model, so that the last run counts the most."""

KEPT_KINDS = 256
"""Of work, those done last: a few dozen recipes on two devices."""

MAX_BYTES = 1 << 20
"""A full file has half of it; bounds what a hostile file costs."""

Positive = Annotated[float, Field(gt=0, le=1e18, allow_inf_nan=False)]


class Run(NamedTuple):
    """One piece of work: units in the measure of its kind, and the seconds it took."""

    units: float
    seconds: float


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    machine: Annotated[str, Field(max_length=1000)]
    runs: dict[Annotated[str, Field(max_length=200)], list[tuple[Positive, Positive]]] = {}


class RunHistory:
    """The runs of one machine.

    Args:
        folder: Where histories are kept; it need not exist.
        machine: What ``machine_identity`` returns.
    """

    def __init__(self, folder: Path, machine: str) -> None:
        self.machine = machine
        self.path = folder / f"{digest_of_fields({'machine': machine})[:16]}.json"
        self._runs = {work: [Run(*run) for run in runs] for work, runs in self._read().runs.items()}

    @property
    def kinds(self) -> dict[str, int]:
        """How many runs there are, by kind of work."""
        return {work: len(runs) for work, runs in self._runs.items()}

    def runs(self, work: str) -> list[Run]:
        """Return what is known of a kind of work, oldest first."""
        return list(self._runs.get(work, ()))

    @contextlib.contextmanager
    def recording(self) -> Iterator[Record]:
        """Yield a ``Record``; what it was told is stored at the end, a cancelled run's as well."""
        told: list[tuple[str, Run]] = []

        def record(work: str, units: float, seconds: float) -> None:
            told.append((work, Run(units, seconds)))

        try:
            yield record
        finally:
            if told:
                self._store(told)

    def _store(self, told: list[tuple[str, Run]]) -> None:
        # read again: another process may have stored meanwhile
        runs = {work: [Run(*run) for run in kept] for work, kept in self._read().runs.items()}
        for work, run in told:
            # to the end: what was done last is kept
            runs[work] = [*runs.pop(work, []), run][-KEPT_RUNS:]
        self._runs = dict(list(runs.items())[-KEPT_KINDS:])
        stored = _File(machine=self.machine, runs=self._runs)  # type: ignore[arg-type]
        try:
            with storing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, stored.model_dump_json(indent=1).encode())
        except StorageError as error:
            logger.warning("How long this run took is not kept: %s", error)

    def _read(self) -> _File:
        fault: object = f"it is larger than {MAX_BYTES} bytes"
        try:
            if self.path.stat().st_size <= MAX_BYTES:
                return _File.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return _File(machine=self.machine)
        except OSError as error:
            fault = error
        except ValidationError as error:
            fault = error.errors()[0]["msg"]
        logger.warning("The times of earlier runs in '%s' are lost: %s", self.path, fault)
        return _File(machine=self.machine)


def machine_identity(gpu: str) -> str:
    """Name this machine by what decides how fast it is.

    Args:
        gpu: Its name; empty without one.
    """
    return f"{platform.node()}, {_cpu()}, {os.cpu_count()} cores, {gpu or 'no GPU'}"


def _cpu() -> str:
    # Python tells the architecture only on Linux
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return (
            next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
        )
    return platform.processor() or platform.machine()
