"""Looking at native libraries from a process of its own: one that crashes or hangs is a finding.

The hidden command `probe NAME` prints what it found as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from .folders import PACK

TIMEOUT_SECONDS = 120.0
_KEPT_CHARACTERS = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("probe", choices=("torch", "tensorrt_rtx", "tensorrt"))


def run(chosen: argparse.Namespace) -> int:
    """Print what one library says."""
    found = _torch() if chosen.probe == "torch" else _backend(chosen.probe)
    print(json.dumps(found))
    return 0


class NativeProbe:
    """One probe in a child process, started at once so that probes run side by side."""

    def __init__(self, name: str) -> None:
        flags = ["-s"] if sys.flags.no_user_site else []
        self._process = subprocess.Popen(
            [sys.executable, *flags, str(PACK), "probe", name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )

    def result(self) -> dict[str, Any]:
        """Wait for the child and return what it printed, or how it ended."""
        try:
            output, errors = self._process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return {"error": f"no answer within {TIMEOUT_SECONDS:g} seconds"}
        lines = output.strip().splitlines()
        try:
            # libraries may print as well; the answer comes last
            found = json.loads(lines[-1]) if lines else None
        except ValueError:
            found = None
        if self._process.returncode == 0 and isinstance(found, dict):
            return found
        text = errors.strip()[-_KEPT_CHARACTERS:] or "no output"
        return {"error": f"the process ended with code {self._process.returncode}: {text}"}


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    from ..trt_runtime.backend import probe_gpu

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
    problem = probe_gpu().problem
    if problem:
        return found | {"gpu": problem}
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return found | {"gpu": gpus}


def _backend(name: str) -> dict[str, Any]:
    from ..trt_runtime.backend import load_backend
    from ..trt_runtime.errors.backend import BackendMissingError

    try:
        return {"version": load_backend(name).version}
    except BackendMissingError as error:
        return {"error": error.reason}
