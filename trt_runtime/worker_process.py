"""The parent's side of a build process: start, feed, watch and kill it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from .errors import EngineError
from .errors.backend import BackendMissingError
from .errors.build import OUT_OF_MEMORY, EngineLintError, PlanBuildError
from .errors.storage import DiskFullError, FileWriteError
from .liveness import Liveness
from .plan import BuildJob, BuiltPlan
from .resources import GIB

logger = logging.getLogger(__name__)

KILL_SECONDS = 10.0
LOG_TAIL_LINES = 8
LOG_TAIL_BYTES = 4096
WORKER_SCRIPT = Path(__file__).with_name("worker.py")

WORKER_ERRORS: dict[str, type[EngineError]] = {
    kind.__name__: kind
    for kind in (
        BackendMissingError,
        DiskFullError,
        EngineLintError,
        FileWriteError,
        PlanBuildError,
    )
}
"""What `plan.PlanFactory` raises; it comes from the worker as a name and the error's fields."""

Events = queue.SimpleQueue[tuple["BuildWorker", "dict[str, Any] | None"]]


@dataclass(frozen=True)
class LostWorker:
    """A process that ended or hung before it answered."""

    job: BuildJob
    cause: str
    log_tail: list[str]


class BuildWorker:
    """One child process that builds one block at a time."""

    def __init__(self, events: Events) -> None:
        self.job: BuildJob | None = None
        # a file, not a pipe: nobody has to drain it, and it survives the process
        self._log: IO[bytes] = tempfile.TemporaryFile("a+b")  # noqa: SIM115
        self._process = subprocess.Popen(
            worker_command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            # a group of its own, so that kill() also ends what a launcher or a debugger started
            start_new_session=sys.platform != "win32",
            creationflags=_creation_flags(),
        )
        self._liveness = Liveness(self._process.pid)
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def submit(self, job: BuildJob) -> None:
        """Give the idle worker a block."""
        self.job = job
        self._liveness.begin()
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(asdict(job)) + "\n")
            stdin.flush()
        except OSError:
            # it died before it read the job; its end of output is reported through the events
            return

    def signal(self) -> None:
        """Tell the process and everything in its group to end at once, without waiting for it."""
        stdin = self._process.stdin
        assert stdin is not None
        # Windows: a venv's python.exe is a launcher; the real worker ends itself at end of input
        with contextlib.suppress(OSError):
            stdin.close()
        if sys.platform == "win32":
            self._process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the process, wait until it is gone, and release pipes and log."""
        self.signal()
        stdout = self._process.stdout
        assert stdout is not None
        if self._exit_code() is None:
            logger.warning("The build process %d does not end, although it was killed", self.pid)
        self._reader.join(KILL_SECONDS)
        stdout.close()
        self._log.close()

    def died(self) -> LostWorker:
        """Describe the end of a process that closed its output; its job is no longer in work."""
        code = self._exit_code()
        cause = "it closed its output without ending" if code is None else exit_cause(code)
        if OUT_OF_MEMORY in cause:
            seen = self._liveness
            held = f"it held {seen.peak_bytes / GIB:.1f} GiB, " if seen.peak_bytes else ""
            cause += f": {held}{seen.least_free} were free"
        return self._lost(cause)

    def hung(self) -> LostWorker | None:
        """End the process if it shows no sign of life any more; its job is no longer in work."""
        cause = self._liveness.hang()
        if not cause:
            return None
        self.signal()
        return self._lost(cause)

    def _exit_code(self) -> int | None:
        try:
            return self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def _lost(self, cause: str) -> LostWorker:
        assert self.job is not None
        lost = LostWorker(self.job, cause, self._log_tail())
        self.job = None
        return lost

    def _log_tail(self) -> list[str]:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - LOG_TAIL_BYTES))
        lines = self._log.read().decode("utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()][-LOG_TAIL_LINES:]

    def _read(self, events: Events) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = _answer_from_line(line)
            if answer is None:
                continue
            if "messages" in answer:
                self._liveness.messages = answer["messages"]
            else:
                events.put((self, answer))
        events.put((self, None))


def worker_command() -> list[str]:
    """Return the command of a worker: this interpreter, with the same view of user packages."""
    flags = ["-s"] if sys.flags.no_user_site else []
    return [sys.executable, *flags, str(WORKER_SCRIPT)]


def _creation_flags() -> int:
    if sys.platform == "win32":
        # no console window when ComfyUI has none
        return subprocess.CREATE_NO_WINDOW
    return 0


def exit_cause(code: int) -> str:
    """Describe an exit code: the signal's name, and the likely reason of a kill."""
    if code >= 0:
        return f"exit code {code}" if code < 1 << 16 else f"exit code {code:#x}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else "unknown"
    hint = f", most likely {OUT_OF_MEMORY}" if -code == 9 else ""
    return f"signal {-code} {name}{hint}"


def _answer_from_line(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        # something in the process printed before the worker took standard output away
        logger.warning("Unexpected output of the build process: %s", line.rstrip())
        return None


def plan_from_answer(answer: dict[str, Any]) -> BuiltPlan:
    """Return what a worker has built, or raise the error that it reported."""
    if "built" in answer:
        return BuiltPlan(**answer["built"])
    kind, arguments = answer["error"], answer["arguments"]
    if "path" in arguments:
        arguments["path"] = Path(arguments["path"])
    raise WORKER_ERRORS[kind](**arguments)
