"""A full disk or a hardware error at every single write, fsync and rename of the three stages.

Each must become an error of ours, leave nothing incomplete under a final name, and not stand in the
way of the next run.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from flux_fp4.quant.checkpoint_writer import CheckpointWriter
from flux_fp4.quant.errors import QuantError
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.tests.faults.conftest import results, temporaries
from flux_fp4.tests.faults.failing_disk import FailingDisk
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_SPEC, silent
from flux_fp4.trt_runtime import builder
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.errors.storage import StorageError
from flux_fp4.trt_runtime.manifest import EngineManifest, load_manifest, read_manifest_file
from flux_fp4.trt_runtime.plan import BuildJob, BuiltPlan
from flux_fp4.trt_runtime.store import write_atomic
from quantize_tiny import quantize
from tiny_flux import ignore_progress

CODES = pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])


@contextlib.contextmanager
def failing_disk(folder: Path) -> Iterator[FailingDisk]:
    with pytest.MonkeyPatch.context() as patch:
        yield FailingDisk(folder, patch)


def calls_of(run: Callable[[], object], folder: Path) -> list[str]:
    """Return the calls of an undisturbed run."""
    with failing_disk(folder) as disk:
        run()
    return disk.calls


def assert_told(error: Exception, code: int) -> None:
    """Check that a person can act on the message."""
    kind = type(error).__name__
    assert (kind == "DiskFullError") == (code == errno.ENOSPC), error
    text = str(error)
    assert "again" in text or "extra_model_paths" in text
    assert "'" in text
    assert isinstance(error.__cause__, OSError)


def told(run: Callable[[], object], folder: Path, index: int, code: int) -> bool:
    """Run with one failing call; return whether it ended the run, which is then told.

    Some calls may fail without harm: making a folder that is there, a note inside a lock file.
    """
    with failing_disk(folder) as disk:
        disk.fail(index, code)
        try:
            run()
        except (QuantError, StorageError) as error:
            assert_told(error, code)
            return True
        assert len(disk.calls) > index
    return False


def assert_nearly_all(failed: list[bool], calls: list[str]) -> None:
    """Check that what did not end the run were folders that exist, lock files and probes."""
    harmless = {call for call, ended in zip(calls, failed, strict=True) if not ended}
    for call in harmless:
        assert "lock" in call or call.startswith(("mkdir", "probe")), call


class TwoParts:
    """A checkpoint of two parts, written as quantization does."""

    layout = {  # noqa: RUF012
        f"{block}.weight": (torch.bfloat16, (4, 8)) for block in ("double_blocks.0", "img_in")
    }

    def __init__(self, path: Path, quantized: QuantizedCheckpoint) -> None:
        self.path, self.metadata = path, quantized.metadata

    def __call__(self) -> None:
        with CheckpointWriter(self.path, self.layout, "job") as writer:
            for value, name in enumerate(self.layout):
                if name not in writer.finished:
                    writer.add(name, torch.full((4, 8), value, dtype=torch.bfloat16))
                    writer.finish_part(name, value)
            writer.finish(self.metadata)


@CODES
def test_every_write_of_a_checkpoint(
    quantized: QuantizedCheckpoint, tmp_path: Path, code: int
) -> None:
    write = TwoParts(tmp_path / "whole" / "q.safetensors", quantized)
    calls = calls_of(write, tmp_path)
    expected = write.path.read_bytes()
    assert len(calls) > 15
    failed: list[bool] = []
    for index, call in enumerate(calls):
        folder = tmp_path / str(index)
        write.path = folder / "q.safetensors"
        failed.append(told(write, tmp_path, index, code))
        if write.path.exists():
            # the last step only makes the name durable
            assert write.path.read_bytes() == expected, call
        assert write.path.exists() or failed[-1], call
        write()
        assert write.path.read_bytes() == expected, call
        assert temporaries(folder) == [], call
    assert_nearly_all(failed, calls)


@CODES
def test_every_write_of_a_quantization_before_the_checkpoint(
    source: Path, undisturbed: Path, tmp_path: Path, code: int
) -> None:
    """Of calibration; with three of the checkpoint's, whose calls are all alike."""
    folder = tmp_path / "model"
    run = lambda: quantize(source, folder / "tiny.safetensors", statistics=folder / "s")  # noqa: E731
    calls = calls_of(run, tmp_path)
    first = next(i for i, call in enumerate(calls) if call == "open .tiny.partial")
    assert first > 15
    shutil.rmtree(folder)
    failed: list[bool] = []
    for index in range(first + 3):
        failed.append(told(run, tmp_path, index, code))
        assert (folder / "tiny.safetensors").exists() != failed[-1], calls[index]
        if index < first:
            shutil.rmtree(folder, ignore_errors=True)
    assert_nearly_all(failed, calls[: first + 3])
    run()
    assert (folder / "tiny.safetensors").read_bytes() == (
        undisturbed / "tiny.safetensors"
    ).read_bytes()
    assert temporaries(folder) == []


@CODES
def test_every_write_of_an_export(undisturbed: Path, tmp_path: Path, code: int) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    shutil.copy(undisturbed / "tiny.safetensors", folder)
    run = lambda: export_blocks(folder / "tiny.safetensors", ignore_progress)  # noqa: E731
    calls = calls_of(run, tmp_path)
    expected = results(undisturbed)
    assert sum(call.startswith("replace") for call in calls) == len(expected) - 1
    # the calls of one file repeat for the others
    until = calls.index(next(call for call in calls if call.startswith("replace"))) + 4
    failed: list[bool] = []
    chosen = [*range(until), len(calls) - 1]
    for index in chosen:
        for path in folder.glob("*.onnx"):
            path.unlink()
        failed.append(told(run, tmp_path, index, code))
        for name, content in results(folder).items():
            assert content == expected[name], calls[index]
        run()
        assert results(folder) == expected, calls[index]
    assert_nearly_all(failed, [calls[index] for index in chosen])


class CopiedPlans:
    """Stands for the processes: stores the plans of a finished engine as a worker does."""

    def __init__(self, engine: Path) -> None:
        self.engine, self.manifest = engine, load_manifest(engine)

    def __call__(
        self,
        jobs: list[BuildJob],
        workers: int,
        built: Callable[[BuiltPlan], None],
        heartbeat: Callable[[str], None],
    ) -> None:
        entries = {entry.block: entry for entry in self.manifest.blocks}
        for job in jobs:
            entry = entries[job.block]
            write_atomic(Path(job.plan), (self.engine / entry.file).read_bytes())
            built(BuiltPlan(**entry.model_dump(include=set(BuiltPlan.__dataclass_fields__))))


def assert_plans_are_whole(manifest: EngineManifest, folder: Path, engine: Path) -> None:
    for entry in manifest.blocks:
        assert (folder / entry.file).read_bytes() == (engine / entry.file).read_bytes()


@CODES
def test_every_write_of_a_build(
    built_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    done = built_folder / "sm120"
    monkeypatch.setattr(builder, "build_plans", CopiedPlans(done))
    folder = tmp_path / "tiny"
    shutil.copytree(built_folder, folder, ignore=shutil.ignore_patterns("sm120"))
    engine = folder / "sm120"
    run = lambda: build_engine(folder, SMALL_SPEC, silent)  # noqa: E731
    calls = calls_of(run, tmp_path)
    assert len(calls) > 20
    failed: list[bool] = []
    for index, call in enumerate(calls):
        shutil.rmtree(engine, ignore_errors=True)
        failed.append(told(run, tmp_path, index, code))
        if (engine / "manifest.json").exists():
            assert_plans_are_whole(load_manifest(engine), engine, done)
        if (engine / "build.json").exists():
            assert_plans_are_whole(read_manifest_file(engine / "build.json"), engine, done)
        manifest = run()
        assert_plans_are_whole(manifest, engine, done)
        assert temporaries(engine) == [], call
    assert_nearly_all(failed, calls)
