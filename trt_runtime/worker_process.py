"""The parent's side of the build processes: start, feed, watch and kill them."""

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
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from . import errors
from .errors import EngineError, WorkerDiedError
from .plan import BuildJob, BuiltPlan

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
"""How often progress is called, and so how fast a cancel is felt."""

KILL_SECONDS = 10.0
LOG_TAIL_LINES = 8
LOG_TAIL_BYTES = 4096
WORKER_SCRIPT = Path(__file__).with_name("worker.py")

Events = queue.SimpleQueue[tuple["BuildWorker", "dict[str, Any] | None"]]


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
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def submit(self, job: BuildJob) -> None:
        """Give the idle worker a block."""
        self.job = job
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(asdict(job)) + "\n")
            stdin.flush()
        except OSError:
            # it died before it read the job; its end of output is reported through the events
            return

    def kill(self) -> None:
        """End the process and everything in its group, and release pipes and log."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        # Windows: a venv's python.exe is a launcher; the real worker ends itself at end of input
        with contextlib.suppress(OSError):
            stdin.close()
        self._signal()
        self._process.wait(KILL_SECONDS)
        self._reader.join(KILL_SECONDS)
        stdout.close()
        self._log.close()

    def died(self) -> WorkerDiedError:
        """Describe the end of a process that closed its output."""
        code = self._process.wait(KILL_SECONDS)
        block = self.job.block if self.job else ""
        return WorkerDiedError(block, exit_cause(code), self._log_tail())

    def _signal(self) -> None:
        if sys.platform == "win32":
            self._process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _log_tail(self) -> list[str]:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - LOG_TAIL_BYTES))
        lines = self._log.read().decode("utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()][-LOG_TAIL_LINES:]

    def _read(self, events: Events) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = _answer_from_line(line)
            if answer is not None:
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
    hint = ", most likely out of memory" if -code == 9 else ""
    return f"signal {-code} {name}{hint}"


def build_plans(
    jobs: Sequence[BuildJob],
    workers: int,
    built: Callable[[BuiltPlan], None],
    heartbeat: Callable[[str], None],
) -> None:
    """Build all jobs; whatever is raised, by a worker or by a callback, no process is left.

    Args:
        jobs: The blocks to build.
        workers: Number of processes.
        built: Called for each stored plan, in the order they finish.
        heartbeat: Called at least every 0.1 s with the blocks in work; it may raise to cancel.
    """
    pending, events = deque(jobs), Events()
    pool: list[BuildWorker] = []
    try:
        for _ in range(min(workers, len(jobs))):
            worker = BuildWorker(events)
            pool.append(worker)
            worker.submit(pending.popleft())
        while any(worker.job for worker in pool):
            heartbeat(", ".join(worker.job.block for worker in pool if worker.job))
            try:
                worker, answer = events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if answer is None:
                raise worker.died()
            built(_plan_from_answer(answer))
            worker.job = None
            if pending:
                worker.submit(pending.popleft())
    finally:
        for worker in pool:
            worker.kill()


def _answer_from_line(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        # something in the process printed before the worker took standard output away
        logger.warning("Unexpected output of the build process: %s", line.rstrip())
        return None


def _plan_from_answer(answer: dict[str, Any]) -> BuiltPlan:
    if "built" in answer:
        return BuiltPlan(**answer["built"])
    kind, arguments = answer["error"], answer["arguments"]
    if "path" in arguments:
        arguments["path"] = Path(arguments["path"])
    error: type[EngineError] = getattr(errors, kind)
    raise error(**arguments)
