"""The build process: reads jobs and writes answers as JSON lines.

It runs as a script (`python worker.py`), so that building needs neither ComfyUI nor the pack's root
package, and a crash or a kill of TensorRT's native code cannot take ComfyUI with it. The jobs
arrive on standard input; its end means that the parent is gone.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

PACKAGE = "_flux_fp4_build_worker"
"""Private name of trt_runtime in this process."""

HEARTBEAT_SECONDS = 1.0


def load_package() -> None:
    """Import the folder of this file as the package PACKAGE, whatever the pack is called."""
    folder = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} is not a package")
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


def read_jobs(jobs: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Queue each line of standard input; at its end leave at once, even amid a build."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    os._exit(0)


def report(message: str) -> None:
    """Write a line to the parent's log of this process."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


class Protocol:
    """The pipe to the parent; TensorRT's messages may come from any thread."""

    def __init__(self) -> None:
        self._pipe = _take_standard_output()
        self._lock = threading.Lock()
        self._messages = 0
        self._last = 0.0

    def send(self, answer: dict[str, Any]) -> None:
        """Write one answer."""
        with self._lock:
            self._pipe.write(json.dumps(answer) + "\n")
            self._pipe.flush()

    def count_message(self) -> None:
        """Tell the parent how many messages TensorRT has given: it is at work."""
        self._messages += 1
        now = time.monotonic()
        if now - self._last >= HEARTBEAT_SECONDS:
            self._last = now
            self.send({"messages": self._messages})


def _take_standard_output() -> TextIO:
    """Return the pipe to the parent, and send what native code prints to standard error instead."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def serve(jobs: queue.SimpleQueue[dict[str, Any]], protocol: Protocol) -> None:
    """Answer jobs until the process ends."""
    plan = importlib.import_module(f"{PACKAGE}.plan")
    errors = importlib.import_module(f"{PACKAGE}.errors")
    factory = None
    while True:
        fields = jobs.get()
        job = plan.BuildJob(**fields)
        report(f"building {job.block}")
        try:
            factory = factory or plan.PlanFactory(job.backend, report, protocol.count_message)
            answer = {"built": vars(factory.build(job))}
        except errors.EngineError as error:
            arguments = {key: _plain(value) for key, value in vars(error).items()}
            answer = {"error": type(error).__name__, "arguments": arguments}
        protocol.send(answer)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def main() -> None:
    """Run the worker."""
    # As a script, Python put this folder first on the path, where "signature" or "plan" would
    # shadow others.
    folder = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry != folder]
    faulthandler.enable()
    protocol = Protocol()
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=read_jobs, args=(jobs,), daemon=True).start()
    load_package()
    serve(jobs, protocol)


if __name__ == "__main__":
    main()
