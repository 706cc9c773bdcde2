"""Model folders that are links or cannot be written to, and clocks that jump."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.tests.faults.conftest import is_root, results, temporaries
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_SPEC, silent
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.manifest import load_manifest
from quantize_tiny import quantize
from stage_runs import NOBODY, Stage, finished, log_of, run_build, run_export, run_quantize, started
from tiny_flux import ignore_progress

posix = pytest.mark.skipif(os.name == "nt", reason="Requires: POSIX permissions")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own are for one user."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@posix
@pytest.mark.parametrize(
    ("stage", "error"),
    [
        (run_quantize, "FolderNotWritableError: The folder 'tiny' cannot be written to"),
        (run_export, "FileWriteError: '.onnx.lock' cannot be written into the folder 'tiny'"),
        (run_build, "FileWriteError: 'sm120' cannot be written into the folder 'tiny'"),
    ],
    ids=["quantize", "export", "build"],
)
def test_read_only_folder_is_told(
    source: Path, undisturbed: Path, built_folder: Path, open_folder: Path, stage: Stage, error: str
) -> None:
    folder, log = open_folder / "tiny", log_of(open_folder / "tiny")
    made = built_folder if stage is run_build else undisturbed
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("sm120", "*.lock", "statistics"))
    copy = Path(shutil.copy(source, open_folder))
    copy.chmod(0o644)
    before = results(folder)
    folder.chmod(0o555)
    log.touch()
    log.chmod(0o666)
    # root may write everywhere, so the run becomes another user's
    process = started(stage, copy, folder, NOBODY if is_root() else None)
    process.join(60)
    folder.chmod(0o755)
    assert process.exitcode == 1, log.read_text()
    assert error in log.read_text()
    assert "Permission denied" in log.read_text()
    assert results(folder) == before
    finished(started(stage, copy, folder), log)


@posix
def test_model_folder_that_is_a_link(
    source: Path, undisturbed: Path, built_folder: Path, tmp_path: Path
) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real, target_is_directory=True)
    quantize(source, link / "tiny.safetensors")
    export_blocks(link / "tiny.safetensors", ignore_progress)
    assert results(real) == results(undisturbed)
    shutil.copytree(built_folder, real / "other", ignore=shutil.ignore_patterns("sm120"))
    build_engine(link / "other", SMALL_SPEC, silent)
    load_manifest(real / "other" / "sm120")
    assert temporaries(real) == []


@pytest.mark.parametrize("jump", [-1e9, 1e9], ids=["back", "forward"])
def test_jumping_clock_disturbs_nothing(
    source: Path,
    undisturbed: Path,
    built_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    jump: float,
) -> None:
    """The clock of the day jumps with every question; `time.monotonic` is what does not jump."""
    now = time.time
    jumps = iter(range(sys.maxsize))
    monkeypatch.setattr(time, "time", lambda: max(0.0, now() + jump * next(jumps)))
    folder = tmp_path / "tiny"
    with caplog.at_level(logging.INFO):
        quantize(source, folder / "tiny.safetensors")
        export_blocks(folder / "tiny.safetensors", ignore_progress)
        assert results(folder) == results(undisturbed)
        shutil.copytree(built_folder, folder / "other", ignore=shutil.ignore_patterns("sm120"))
        build_engine(folder / "other", SMALL_SPEC, silent)
    seconds = [float(text.split()[-2]) for text in caplog.messages if text.endswith(" s")]
    assert len(seconds) >= 3
    assert all(0 <= value < 300 for value in seconds)
