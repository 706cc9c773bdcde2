"""What runs took is found again, and whatever happens to the file, nothing else fails."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from flux_fp4.trt_runtime import run_history
from flux_fp4.trt_runtime.run_history import RunHistory, machine_identity

WORK = "quantize double, nvfp4"


def tell(folder: Path, *runs: tuple[str, float, float], machine: str = "this one") -> RunHistory:
    history = RunHistory(folder, machine)
    with history.recording() as record:
        for run in runs:
            record(*run)
    return history


def test_runs_are_found_by_the_same_machine_only(tmp_path: Path) -> None:
    folder = tmp_path / "models" / ".durations"
    told = tell(folder, (WORK, 100, 2.0), (WORK, 100, 3.0), ("build", 5, 1.0))
    assert told.runs(WORK) == [(100, 2.0), (100, 3.0)]
    again = RunHistory(folder, "this one")
    assert again.runs(WORK) == told.runs(WORK)
    assert again.kinds == {WORK: 2, "build": 1}
    assert RunHistory(folder, "another one").runs(WORK) == []
    assert len(list(folder.iterdir())) == 1


def test_nothing_told_writes_nothing(tmp_path: Path) -> None:
    tell(tmp_path / "durations")
    assert list(tmp_path.iterdir()) == []


def test_a_cancelled_run_keeps_what_was_finished(tmp_path: Path) -> None:
    def cancelled() -> None:
        with RunHistory(tmp_path, "m").recording() as record:
            record(WORK, 1, 2.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cancelled()
    assert RunHistory(tmp_path, "m").runs(WORK) == [(1, 2.0)]


def test_two_processes_add_up(tmp_path: Path) -> None:
    first, second = RunHistory(tmp_path, "m"), RunHistory(tmp_path, "m")
    for history, work in ((first, "a"), (second, "b")):
        with history.recording() as record:
            record(work, 1, 1.0)
    assert RunHistory(tmp_path, "m").kinds == {"a": 1, "b": 1}


def test_size_is_bounded_and_the_last_runs_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_history, "KEPT_RUNS", 3)
    monkeypatch.setattr(run_history, "KEPT_KINDS", 2)
    tell(tmp_path, ("old", 1, 1.0), ("used", 1, 1.0))
    tell(tmp_path, *(("used", 1, float(second)) for second in range(2, 6)), ("new", 1, 1.0))
    history = RunHistory(tmp_path, "this one")
    assert history.kinds == {"used": 3, "new": 1}
    assert [run.seconds for run in history.runs("used")] == [3, 4, 5]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"machine": "m", "runs": {"a": [[1, -1]]}}',
        b'{"machine": "m", "runs": {"a": [[1, NaN]]}}',
        b'{"machine": "m", "runs": {"a": [[1]]}}',
        b'{"machine": "m", "runs": {}, "format_version": 2}',
        b" " * (run_history.MAX_BYTES + 1),
    ],
)
def test_a_damaged_file_is_begun_anew_with_a_warning(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = RunHistory(tmp_path, "m").path
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        history = RunHistory(tmp_path, "m")
    assert history.kinds == {}
    assert path.name in caplog.text
    with history.recording() as record:
        record(WORK, 1, 1.0)
    assert RunHistory(tmp_path, "m").kinds == {WORK: 1}


def test_a_folder_that_cannot_be_made_costs_a_warning_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "durations").write_text("a file")
    with caplog.at_level(logging.WARNING):
        history = tell(tmp_path / "durations", (WORK, 1, 1.0))
    assert "is not kept" in caplog.text
    assert history.runs(WORK) == [(1, 1.0)]


def test_a_full_file_is_below_the_limit(tmp_path: Path) -> None:
    kinds = [f"{index}".rjust(200, "k") for index in range(run_history.KEPT_KINDS)]
    run = (12345678.123456789, 1234.123456789012)
    history = tell(
        tmp_path, *((kind, *run) for kind in kinds for _ in range(run_history.KEPT_RUNS))
    )
    assert history.path.stat().st_size < run_history.MAX_BYTES
    assert RunHistory(tmp_path, "this one").kinds == history.kinds


def test_identity_tells_gpu_and_processor() -> None:
    identity = machine_identity("RTX 5090")
    assert identity.endswith("cores, RTX 5090")
    assert machine_identity("").endswith("no GPU")
    assert len(json.dumps(identity)) > 20
