from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from flux_fp4.trt_runtime.errors.storage import DiskFullError, FileWriteError
from flux_fp4.trt_runtime.store import locked, remove, remove_temporaries, write_atomic

TOOLS = Path(__file__).parents[2] / "tools"

HANGING_WRITER = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from pack_import import register_pack
register_pack()
from flux_fp4.trt_runtime.store import write_atomic
def hang(_):
    print("written", flush=True)
    time.sleep(60)
os.fsync = hang
write_atomic(pathlib.Path(sys.argv[2]), b"x" * 1000)
"""


def test_write_replaces_the_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "a.plan"
    write_atomic(path, b"first, and longer")
    write_atomic(path, memoryview(b"second"))
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["a.plan"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_told_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "a.plan"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        # delayed allocation: file systems may report the full disk only here
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError) as caught:
        write_atomic(path, b"12345")
    assert (caught.value.path, caught.value.needed_bytes) == (path, 5)
    assert caught.value.free_bytes > 0
    assert "needs 0.0 kB" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.plan"]
    assert path.read_bytes() == b"old"


def test_other_errors_are_told_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(source: Path, destination: Path) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(FileWriteError, match=r"'a\.plan' cannot be written.*denied"):
        write_atomic(tmp_path / "a.plan", b"x")
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_only_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.plan"
    command = [sys.executable, "-c", HANGING_WRITER, str(TOOLS), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    (temporary,) = tmp_path.iterdir()
    assert temporary.suffix == ".tmp"
    other = tmp_path / ".notes.tmp"
    other.write_text("mine")
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [other]


def test_lock_makes_the_second_wait_and_report(tmp_path: Path) -> None:
    waits, order = [], []

    def second() -> None:
        with locked(tmp_path, lambda: waits.append(time.monotonic())):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(tmp_path, lambda: None):
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]
    assert len(waits) >= 2


def test_waiting_for_the_lock_can_be_cancelled(tmp_path: Path) -> None:
    class Cancelled(BaseException):
        pass

    def cancel() -> None:
        raise Cancelled

    with locked(tmp_path, lambda: None), pytest.raises(Cancelled), locked(tmp_path, cancel):
        pass
    with locked(tmp_path, cancel):
        pass


def test_leaving_the_lock_removes_what_a_killed_worker_left(tmp_path: Path) -> None:
    with locked(tmp_path, lambda: None):
        (tmp_path / ".a.plan.4711.tmp").write_bytes(b"half")
    assert [path.name for path in tmp_path.iterdir()] == ["build.lock"]


def test_file_that_cannot_be_deleted_does_not_fail_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = tmp_path / "a.plan"
    plan.write_bytes(b"mapped by an engine, on Windows")

    def denied(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "The process cannot access the file")

    monkeypatch.setattr(Path, "unlink", denied)
    remove(plan)
    assert "'a.plan' is no longer needed, but stays" in caplog.text
