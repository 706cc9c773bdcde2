"""Seconds come from earlier runs; what never ran is tried out with a small part."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from comfy_in_process import import_comfyui
from quantize_tiny import with_recipe
from tiny_flux import TINY, ignore_progress, random_flux, save_flux

import_comfyui()

from flux_fp4.nodes import estimates  # noqa: E402
from flux_fp4.nodes.estimates import SAMPLES, TOKENS, Work, stage_lines  # noqa: E402
from flux_fp4.quant import durations  # noqa: E402
from flux_fp4.quant.needs import needs_of  # noqa: E402
from flux_fp4.quant.sources.source import open_source  # noqa: E402
from flux_fp4.trt_runtime.durations import START, build_work  # noqa: E402
from flux_fp4.trt_runtime.run_history import RunHistory  # noqa: E402
from flux_fp4.trt_runtime.targets import build_spec  # noqa: E402

OPTIONS = with_recipe("nvfp4-max")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    path = tmp_path_factory.mktemp("source") / "source.safetensors"
    source = open_source(save_flux(random_flux(), path))
    spec = build_spec("sm120", 2, 1, 512)
    return Work(source, OPTIONS, needs_of(source, OPTIONS), spec, "cpu")


@pytest.fixture
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "automatic_workers", lambda size: 1)


def history_of(work: Work, folder: Path) -> RunHistory:
    """A machine on which every block took 60 s in every stage, and the rest as well."""
    history = RunHistory(folder, "this one")
    with history.recording() as record:
        for block in TINY.block_names:
            weights = durations.block_weights(work.source, block)
            operations = durations.block_operations(TINY, block, weights, [TOKENS] * SAMPLES)
            formats = durations.linears_formats(block, OPTIONS)
            record(durations.calibrate_work(block, "cpu"), operations, 60)
            record(durations.quantize_work(block, formats, OPTIONS, "cpu"), weights, 60)
            size = work.needs.block_plans[block]
            record(build_work(block, True, False, True, work.spec), size, 60)
        record(durations.EXPORT, 4, 60)
        record(durations.FINISH, durations.bytes_outside(work.source), 60)
        record(START, 1, 60)
    return history


@pytest.mark.usefixtures("one_worker")
def test_earlier_runs_are_added_up_without_a_trial(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "trial_run", None)
    lines = stage_lines(work, history_of(work, tmp_path), ignore_progress)
    # three blocks, and one minute for the rest of quantization and of the build: 1.3 each way
    assert [re.sub(r".*: about", "about", line) for line in lines[:4]] == [
        "about 2 to 4 min",
        "about 3 to 5 min",
        "about 2 to 4 min",
        "about 3 to 5 min",
    ]
    assert lines[4] == "All stages: about 11 to 18 min; estimated from earlier runs on this machine"
    for line, words in zip(
        lines, ("8 samples of 1 megapixel", "nvfp4-max", "ONNX", "1 processes"), strict=False
    ):
        assert words in line


def test_workers_share_the_blocks(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "automatic_workers", lambda size: 3)
    line = stage_lines(work, history_of(work, tmp_path), ignore_progress)[3]
    assert line == "Building with 3 processes: about 2 to 3 min"


@pytest.mark.usefixtures("one_worker")
def test_what_never_ran_is_tried_out(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "TRIAL_SECONDS", 600)
    phases = []
    history = RunHistory(tmp_path, "this one")
    lines = stage_lines(work, history, lambda phase, done, total: phases.append(phase))
    assert all(" about " in line for line in lines), lines
    assert "a trial with a small part" in lines[-1]
    assert {phase.split()[2] for phase in phases} >= {"Calibrating", "Quantizing", "Building"}
    # of a small part, not of the whole: no later estimate may be made from it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_worker")
def test_a_trial_that_takes_too_long_is_given_up(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "TRIAL_SECONDS", 0)
    lines = stage_lines(work, RunHistory(tmp_path, "this one"), ignore_progress)
    assert lines[0].endswith("not known")
    assert "took more than 0 s" in lines[-1]


@pytest.mark.usefixtures("one_worker")
def test_what_fails_in_a_trial_is_told_with_what_is_known(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "TRIAL_SECONDS", 600)
    ada = replace(work, spec=build_spec("sm89", 2, 1, 512))
    lines = stage_lines(ada, RunHistory(tmp_path, "this one"), ignore_progress)
    assert " about " in lines[1]
    assert lines[3].endswith("not known")
    assert "'sm89' cannot run the NVFP4 weights" in lines[-1]


def test_a_cancel_ends_a_trial(work: Work, tmp_path: Path) -> None:
    def cancel(phase: str, done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        stage_lines(work, RunHistory(tmp_path, "this one"), cancel)
