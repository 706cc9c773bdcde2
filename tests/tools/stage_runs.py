"""The three stages on the tiny model as processes that start fast and can be killed.

A fork server imports everything once; each run is a fork of it.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from pack_import import register_pack

register_pack()

from flux_fp4.quant.onnx_export import export_blocks  # noqa: E402
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_SPEC, silent  # noqa: E402
from flux_fp4.trt_runtime.builder import build_engine  # noqa: E402
from quantize_tiny import quantize  # noqa: E402
from tiny_flux import ignore_progress  # noqa: E402

NOBODY = 65534
TOOLS = Path(__file__).parent


def run_quantize(source: Path, folder: Path) -> None:
    quantize(source, folder / "tiny.safetensors", statistics=folder / "statistics")


def run_export(source: Path, folder: Path) -> None:
    export_blocks(folder / "tiny.safetensors", ignore_progress)


def run_build(source: Path, folder: Path) -> None:
    build_engine(folder, SMALL_SPEC, silent)


Stage = Callable[[Path, Path], None]


def started(stage: Stage, source: Path, folder: Path, user: int | None = None) -> BaseProcess:
    """Start a stage; with `user`, as that user. It appends to `<folder>.log`."""
    process = _fork_server().Process(target=_run, args=(stage, source, folder, user))
    process.start()
    return process


@functools.cache
def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stage_runs"])
    before = os.environ.get("PYTHONPATH")
    # before Python 3.13 the server does not get the path of its parent, and skips what is not found
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TOOLS), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def finished(process: BaseProcess, log: Path) -> None:
    """Wait for the end of a run that must succeed."""
    process.join(120)
    assert process.exitcode == 0, log.read_text() if log.exists() else "no log"


def log_of(folder: Path) -> Path:
    """Return the file that the runs in a folder append to."""
    return folder.with_name(f"{folder.name}.log")


def _run(stage: Stage, source: Path, folder: Path, user: int | None) -> None:
    log = os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if user is not None:
        os.setgid(user)
        os.setuid(user)
    logging.basicConfig(level=logging.INFO, force=True)
    begun = time.monotonic()
    try:
        stage(source, folder)
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", flush=True)
        # past the handlers of the fork server
        os._exit(1)
    print(f"ran {time.monotonic() - begun:.3f}", flush=True)
    os._exit(0)
