"""Cancel, crash and kill during real builds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_SPEC, silent
from flux_fp4.tests.unit.trt_runtime.test_builder import Recorder, plan_times
from flux_fp4.trt_runtime import liveness, worker_process
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.digest import digest_of_file
from flux_fp4.trt_runtime.errors.build import PlanBuildError, WorkerDiedError
from flux_fp4.trt_runtime.errors.engine import ManifestMissingError
from flux_fp4.trt_runtime.errors.storage import DiskFullError, FileWriteError
from flux_fp4.trt_runtime.manifest import load_manifest, read_manifest_file
from flux_fp4.trt_runtime.plan import BuildJob
from flux_fp4.trt_runtime.plan_build import profile_shapes
from flux_fp4.trt_runtime.signature import read_signature
from flux_fp4.trt_runtime.worker_process import BuildWorker, exit_cause

TOOLS = Path(__file__).parents[2] / "tools"

posix = pytest.mark.skipif(os.name == "nt", reason="Requires: POSIX signals")

PARENT = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from pack_import import register_pack
register_pack()
from flux_fp4.trt_runtime import worker_process
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_SPEC
start = worker_process.BuildWorker.__init__
def announced(self, events):
    start(self, events)
    print("worker", self.pid, flush=True)
worker_process.BuildWorker.__init__ = announced
build_engine(pathlib.Path(sys.argv[2]), SMALL_SPEC, lambda *call: print(*call, flush=True))
"""


class Cancelled(BaseException):
    """Like ComfyUI's interrupt, which is not an Exception."""


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[BuildWorker]:
    """Collect the workers that the test starts."""
    started: list[BuildWorker] = []
    original = BuildWorker.__init__

    def recorded(self: BuildWorker, events: worker_process.Events) -> None:
        original(self, events)
        started.append(self)

    monkeypatch.setattr(BuildWorker, "__init__", recorded)
    return started


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody reaps does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def assert_resumes(folder: Path, finished: list[str], total: int) -> None:
    """Check that what is stored is whole, and that the next build makes only the rest."""
    engine_dir = folder / "sm120"
    kept = {}
    if finished:
        entries = read_manifest_file(engine_dir / "build.json").blocks
        assert [entry.block for entry in entries] == finished
        kept = {entry.file: entry.digest for entry in entries}
    for name, digest in kept.items():
        assert digest_of_file(engine_dir / name) == digest
    with pytest.raises(ManifestMissingError):
        load_manifest(engine_dir)
    times = plan_times(engine_dir)
    progress = Recorder()
    manifest = build_engine(folder, SMALL_SPEC, progress)
    assert len(progress.built()) == total - len(finished)
    assert not set(progress.built()) & set(finished)
    after = plan_times(engine_dir)
    assert all(after[name] == times[name] for name in kept)
    assert len(manifest.blocks) == total
    assert not [p for p in engine_dir.iterdir() if p.suffix == ".tmp" or p.name == "build.json"]


def works_on(worker: BuildWorker, block: str) -> bool:
    """Whether a worker has begun with a block."""
    return worker.job is not None and f"building {block}" in worker._log_tail()


@posix
def test_worker_killed_twice_at_one_block_is_reported_and_the_build_resumes(
    blocks: Callable[..., Path], workers: list[BuildWorker]
) -> None:
    folder = blocks(depth=1, depth_single=2)

    def kill_in_second_block(phase: str, done: int, total: int) -> None:
        if phase.startswith("Building") and works_on(workers[-1], "single_blocks.0"):
            os.kill(workers[-1].pid, signal.SIGKILL)

    with pytest.raises(WorkerDiedError, match="lower 'workers'") as caught:
        build_engine(folder, SMALL_SPEC, kill_in_second_block)
    error = caught.value
    assert error.block == "single_blocks.0"
    for cause in (error.first_cause, error.cause):
        assert re.search(r"SIGKILL, most likely killed for want of memory.* GiB were free", cause)
    assert "building single_blocks.0" in error.log_tail
    assert len(workers) == 2
    assert not any(is_running(worker.pid) for worker in workers)
    assert_resumes(folder, ["double_blocks.0"], 3)


@posix
def test_block_of_a_worker_killed_once_is_built_again_with_no_other_at_work(
    blocks: Callable[..., Path], workers: list[BuildWorker], caplog: pytest.LogCaptureFixture
) -> None:
    folder = blocks(depth=0, depth_single=4)
    killed: list[str] = []

    class KillOnce(Recorder):
        def __call__(self, phase: str, done: int, total: int) -> None:
            super().__call__(phase, done, total)
            for worker in workers[:2]:
                block = worker.job.block if worker.job else ""
                if phase.startswith("Building") and not killed and works_on(worker, block):
                    killed.append(block)
                    os.kill(worker.pid, signal.SIGKILL)
            if phase == f"Building {killed[0] if killed else ''} again, alone":
                assert [w.job.block for w in workers if is_running(w.pid)] == killed

    progress = KillOnce()
    manifest = build_engine(folder, SMALL_SPEC, progress, workers=2)
    assert len(manifest.blocks) == 4
    assert len(progress.built()) == 4
    assert f"Building {killed[0]} again, alone" in {phase for phase, _, _ in progress.calls}
    assert f"The build process of block {killed[0]} was lost (signal 9 SIGKILL" in caplog.text
    assert not any(is_running(worker.pid) for worker in workers)


@posix
def test_crash_of_native_code_is_reported_with_its_signal(
    blocks: Callable[..., Path], workers: list[BuildWorker]
) -> None:
    def crash(phase: str, done: int, total: int) -> None:
        if phase.startswith("Building") and works_on(workers[-1], "single_blocks.0"):
            os.kill(workers[-1].pid, signal.SIGSEGV)

    with pytest.raises(WorkerDiedError, match="SIGSEGV") as caught:
        build_engine(blocks(depth=0), SMALL_SPEC, crash)
    assert any("Segmentation fault" in line or "File" in line for line in caught.value.log_tail)
    assert "'workers'" not in str(caught.value)


@posix
def test_stopped_worker_counts_as_hung_and_its_block_is_built_again(
    blocks: Callable[..., Path],
    workers: list[BuildWorker],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(liveness, "CHECK_SECONDS", 0.2)
    monkeypatch.setattr(liveness, "STALLED_SECONDS", 1.0)

    def stop_the_first(phase: str, done: int, total: int) -> None:
        if len(workers) == 1 and works_on(workers[0], "single_blocks.0"):
            os.kill(workers[0].pid, signal.SIGSTOP)

    assert len(build_engine(blocks(depth=0), SMALL_SPEC, stop_the_first).blocks) == 1
    assert "hung, 1 s without CPU time or a message of TensorRT" in caplog.text
    assert len(workers) == 2
    assert not any(is_running(worker.pid) for worker in workers)


def test_worker_that_computes_in_silence_is_reported_as_hung(
    blocks: Callable[..., Path], workers: list[BuildWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "CHECK_SECONDS", 0.2)
    monkeypatch.setattr(liveness, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(liveness, "STALLED_SECONDS", 1.0)
    source = "import sys; print('in circles', file=sys.stderr, flush=True)\nwhile True: pass"
    monkeypatch.setattr(worker_process, "worker_command", lambda: [sys.executable, "-c", source])
    with pytest.raises(WorkerDiedError, match="of computing without a message") as caught:
        build_engine(blocks(depth=0), SMALL_SPEC, silent)
    assert caught.value.log_tail == ("in circles",)
    assert not any(worker._process.poll() is None for worker in workers)


def test_worker_that_gives_messages_is_never_hung(
    blocks: Callable[..., Path], workers: list[BuildWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits far below the time of a build: every message starts them anew."""
    monkeypatch.setattr(liveness, "CHECK_SECONDS", 0.1)
    source = (
        "import json, sys, time\n"
        "for n in range(1, 20):\n"
        "    print(json.dumps({'messages': n}), flush=True)\n"
        "    time.sleep(0.1)\n"
        "sys.exit('at its end')"
    )
    monkeypatch.setattr(worker_process, "worker_command", lambda: [sys.executable, "-c", source])
    monkeypatch.setattr(liveness, "STALLED_SECONDS", 0.8)
    monkeypatch.setattr(liveness, "SILENT_SECONDS", 0.8)
    with pytest.raises(WorkerDiedError, match=r"exit code 1.*exit code 1.*at its end"):
        build_engine(blocks(depth=0), SMALL_SPEC, silent)


def test_worker_tells_that_tensorrt_gives_messages(
    blocks: Callable[..., Path], workers: list[BuildWorker]
) -> None:
    build_engine(blocks(depth=0), SMALL_SPEC, silent)
    assert workers[0]._liveness.messages >= 1


def test_refused_block_is_not_tried_again(
    blocks: Callable[..., Path], workers: list[BuildWorker]
) -> None:
    folder = blocks(depth=0)
    path = folder / "single_blocks.0.onnx"
    path.write_bytes(path.read_bytes().replace(b"LayerNormalization", b"LayerNormalizatioX"))
    with pytest.raises(PlanBuildError):
        build_engine(folder, SMALL_SPEC, silent)
    assert len(workers) == 1


@posix
def test_cancel_kills_the_worker_within_a_second(
    blocks: Callable[..., Path], workers: list[BuildWorker]
) -> None:
    folder = blocks(depth=1, depth_single=1)
    cancelled_at = []

    def cancel(phase: str, done: int, total: int) -> None:
        if phase == "Building single_blocks.0":
            cancelled_at.append(time.monotonic())
            raise Cancelled

    with pytest.raises(Cancelled):
        build_engine(folder, SMALL_SPEC, cancel)
    assert time.monotonic() - cancelled_at[0] < 1
    assert not is_running(workers[0].pid)
    assert not list((folder / "sm120").glob(".*"))
    assert_resumes(folder, ["double_blocks.0"], 2)


@posix
def test_cancel_amid_a_write_leaves_no_temporary_file(
    blocks: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = blocks(depth=0)
    script = str(worker_process.WORKER_SCRIPT)
    source = (
        f"import os, runpy, time; os.fsync = lambda _: time.sleep(60); "
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    monkeypatch.setattr(worker_process, "worker_command", lambda: [sys.executable, "-c", source])
    seen = []

    def cancel(phase: str, done: int, total: int) -> None:
        seen.extend((folder / "sm120").glob("*.tmp") if (folder / "sm120").is_dir() else ())
        if seen:
            raise Cancelled

    with pytest.raises(Cancelled):
        build_engine(folder, SMALL_SPEC, cancel)
    assert seen
    assert [path.name for path in (folder / "sm120").iterdir()] == ["build.lock"]


@posix
def test_killed_parent_takes_its_worker_along_and_the_build_resumes(
    blocks: Callable[..., Path],
) -> None:
    folder = blocks(depth=1, depth_single=3)
    command = [sys.executable, "-c", PARENT, str(TOOLS), str(folder)]
    built, worker = [], 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        for line in parent.stdout:
            words = line.split()
            if words[0] == "worker":
                worker = int(words[1])
            if words[0] == "Built":
                built.append(words[1])
            if words[:2] == ["Building", "single_blocks.1"]:
                assert is_running(worker)
                parent.kill()
                break
    assert wait_until(lambda: not is_running(worker), 5), "the worker outlived its parent"
    assert built == ["double_blocks.0", "single_blocks.0"]
    assert_resumes(folder, built, 4)


def test_write_error_in_the_worker_is_told_and_not_tried_again(
    blocks: Callable[..., Path], workers: list[BuildWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(worker_process.WORKER_SCRIPT)
    source = (
        "import errno, os, runpy\n"
        "def fail(_): raise OSError(errno.EIO, os.strerror(errno.EIO))\n"
        "os.fsync = fail\n"
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    monkeypatch.setattr(worker_process, "worker_command", lambda: [sys.executable, "-c", source])
    folder = blocks(depth=0)
    with pytest.raises(FileWriteError, match="Input/output error") as caught:
        build_engine(folder, SMALL_SPEC, silent)
    assert caught.value.path.parent == folder / "sm120"
    assert len(workers) == 1
    assert [path.name for path in (folder / "sm120").iterdir()] == ["build.lock"]


@posix
def test_full_disk_in_the_worker_is_told_and_loses_nothing(
    blocks: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = blocks(depth=1, depth_single=1)
    command = worker_process.worker_command()
    # the single block's plan fits into 2.9 MB, the double block's does not; ulimit counts 512 bytes
    limited = ["sh", "-c", 'ulimit -f 5800; exec "$0" "$@"', *command]
    monkeypatch.setattr(worker_process, "worker_command", lambda: limited)
    engine_dir = folder / "sm120"
    engine_dir.mkdir()
    (engine_dir / "notes.txt").write_text("mine")
    with pytest.raises(DiskFullError) as caught:
        build_engine(folder, SMALL_SPEC, silent)
    assert caught.value.path.name.startswith("double_blocks.0-")
    assert caught.value.needed_bytes > 2_900_000
    assert {p.name for p in engine_dir.iterdir()} == {"build.lock", "notes.txt"}
    monkeypatch.undo()
    assert_resumes(folder, [], 2)
    assert (engine_dir / "notes.txt").read_text() == "mine"


def test_worker_leaves_amid_a_build_when_its_input_ends(built_folder: Path, tmp_path: Path) -> None:
    signature = read_signature(built_folder / "double_blocks.0.onnx")
    job = BuildJob(
        block=signature.block,
        backend="tensorrt_rtx",
        onnx=str(signature.path),
        plan=str(tmp_path / "a.plan"),
        targets=("sm120",),
        profile=profile_shapes(signature, SMALL_SPEC.profile),
        fp4_linears=signature.fp4_linears,
        fp8_linears=signature.fp8_linears,
        fp8_attention=True,
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(worker_process.worker_command(), text=True, **pipes) as process:
        process.stdin.write(json.dumps(asdict(job)) + "\n")
        process.stdin.flush()
        assert process.stderr.readline() == "building double_blocks.0\n"
        process.stdin.close()
        try:
            assert process.wait(5) == 0
        finally:
            process.kill()
        assert process.stdout.read() == ""
    assert list(tmp_path.iterdir()) == []


def test_broken_worker_script_is_reported(
    blocks: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such module')"]
    monkeypatch.setattr(worker_process, "worker_command", lambda: command)
    with pytest.raises(WorkerDiedError, match="no such module") as caught:
        build_engine(blocks(depth=0), SMALL_SPEC, silent)
    assert caught.value.cause == "exit code 1"


def test_output_that_is_no_answer_is_ignored(
    blocks: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = str(worker_process.WORKER_SCRIPT)
    source = (
        f"import runpy; print('noise', flush=True); runpy.run_path({script!r}, run_name='__main__')"
    )
    monkeypatch.setattr(worker_process, "worker_command", lambda: [sys.executable, "-c", source])
    assert len(build_engine(blocks(depth=0), SMALL_SPEC, silent).blocks) == 1
    assert "noise" in caplog.text


def test_worker_imports_neither_torch_nor_comfyui(
    blocks: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "import runpy, sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'comfy', 'onnx', 'onnxruntime', 'flux_fp4'):\n"
        "            raise RuntimeError('imported ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"runpy.run_path({str(worker_process.WORKER_SCRIPT)!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", source]
    monkeypatch.setattr(worker_process, "worker_command", lambda: command)
    assert len(build_engine(blocks(depth=0), SMALL_SPEC, silent).blocks) == 1


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (1, "exit code 1"),
        (0xC0000005, "exit code 0xc0000005"),
        (-9, "signal 9 SIGKILL, most likely killed for want of memory"),
        (-11, "signal 11 SIGSEGV"),
    ],
)
def test_exit_codes_in_words(code: int, text: str) -> None:
    assert exit_cause(code) == text
