"""Whole files or none, the lock of their folder, and the sentences about what the disk refuses."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from flux_fp4.quant.checkpoint_writer import CheckpointWriter, remove_leftovers
from flux_fp4.quant.errors.files import CheckpointBusyError, DiskFullError, FileWriteError
from flux_fp4.quant.journal import Journal
from flux_fp4.quant.whole_files import only_writer, whole_file


def test_file_appears_when_the_body_has_finished(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    with whole_file(path) as file:
        file.write(b"first")
        assert not path.exists()

    def cancelled() -> None:
        with whole_file(path) as file:
            file.write(b"second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cancelled()
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.onnx"]


def test_lock_removes_leftovers_of_its_own_files_only(tmp_path: Path) -> None:
    leftover = tmp_path / f".a.mask-{'0' * 32}.tmp"
    others = [tmp_path / f".b-{'0' * 32}.tmp", tmp_path / ".a.tmp", tmp_path / f"a-{'0' * 32}.tmp"]
    for path in (leftover, *others):
        path.touch()
    with only_writer(tmp_path / ".lock", tmp_path, r"a\.mask", lambda: None):
        assert not leftover.exists()
    assert all(path.exists() for path in others)


def test_lock_makes_the_second_wait_until_it_is_cancelled(tmp_path: Path) -> None:
    def cancel() -> None:
        raise KeyboardInterrupt

    lock = tmp_path / ".lock"
    with only_writer(lock, tmp_path, ".+", cancel):
        with pytest.raises(KeyboardInterrupt), only_writer(lock, tmp_path, ".+", cancel):
            pass
        waiting = threading.Event()
        entered = threading.Event()

        def second() -> None:
            with only_writer(lock, tmp_path, ".+", waiting.set):
                entered.set()

        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(5)
        assert not entered.is_set()
    thread.join(5)
    assert entered.is_set()


def test_leftovers_of_a_finished_checkpoint_go_unless_it_is_being_written(tmp_path: Path) -> None:
    path, journal = tmp_path / "q.safetensors", tmp_path / ".q.journal"
    journal.touch()
    with CheckpointWriter(path, {}, "job") as writer:
        assert writer.finished == {}
        journal.touch()
        remove_leftovers(path)
        assert journal.exists()
        with pytest.raises(CheckpointBusyError), CheckpointWriter(path, {}, "job"):
            pass
    journal.touch()
    remove_leftovers(path)
    assert not journal.exists()


def test_reading_a_journal_only_cuts_its_torn_end(tmp_path: Path) -> None:
    path = tmp_path / ".q.journal"
    journal = Journal(path)
    journal.start("job")
    journal.append({"part": "a"})
    whole = path.read_bytes()
    # without its end this line reads as another, whole one
    path.write_bytes(whole + b'{"part": 1')
    inode = path.stat().st_ino
    again = Journal(path)
    assert again.read("job") == [{"part": "a"}]
    assert path.read_bytes() == whole
    # the same file all the time: at no moment is there none on disk
    assert path.stat().st_ino == inode
    assert Journal(path).read("other job") == []


def test_texts() -> None:
    assert str(FileWriteError("a.onnx", "tiny", "Read-only file system")) == (
        "'a.onnx' cannot be written into the folder 'tiny': Read-only file system. Check that "
        "ComfyUI may write there and that the disk is in order, then queue again; what is finished "
        "is kept."
    )
    assert str(DiskFullError("a.onnx", 0, 2**20)) == (
        "'a.onnx' does not fit: its disk takes no more (1.0 MB free). Nothing was changed; free "
        "some space and queue again."
    )
    assert str(DiskFullError("a.onnx", 3 * 2**20, 2**20)).startswith(
        "'a.onnx' needs 3.1 MB, but its disk takes no more (1.0 MB free)."
    )
