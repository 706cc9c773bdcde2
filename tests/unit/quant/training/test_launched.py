"""Distillation in processes that `accelerate launch` starts: equal results, a killed process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from distill_tiny import NAME, SAVE_EVERY, STEPS, Distilled, arguments, distill_here, distillation
from distill_tiny import logged as logged_values
from flux_fp4.quant.e2m1 import decode_packed
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from pack_import import ROOT

COPIED = ROOT / "tests" / "tools" / "distill_in_fp64.py"
SHARDED = ROOT / "tests" / "tools" / "sharded_on_cpu.py"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Requires: POSIX signals")


def launched(program: Path, *more: str) -> subprocess.Popen[str]:
    """Start two processes on the CPU; port 0 lets the launcher take a free one."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(program), *more]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str], seconds: float) -> str:
    """Return what was printed; a process that does not end in time is killed and fails."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        pytest.fail(f"still running after {seconds} s: {process.communicate()[0]}")


def check_equal(models: Path, expected: Distilled) -> None:
    """Losses of every step, and what was written."""
    losses = logged_values(expected.models, "loss")
    assert logged_values(models, "loss") == pytest.approx(losses, rel=1e-4)
    held_out = logged_values(expected.models, "sqnr_db")
    assert logged_values(models, "sqnr_db") == pytest.approx(held_out, abs=0.005)
    written = QuantizedCheckpoint.read(models / NAME / f"{NAME}.safetensors")
    moved = total = 0
    for name, stored in written.tensors.items():
        tensor, other = written.load(name), expected.checkpoint.load(name)
        if stored.dtype == "U8":
            moved += int((decode_packed(tensor) != decode_packed(other)).sum())
            total += 2 * tensor.numel()
        else:
            torch.testing.assert_close(tensor.float(), other.float(), rtol=1e-2, atol=1e-4)
    # a value on the border between two codes may fall to either side
    assert moved <= total * 1e-4, f"{moved} of {total} codes differ"


def test_killed_process_ends_the_run_which_goes_on_to_the_same(
    inputs: Path, distilled: Distilled, models: Path
) -> None:
    process = launched(COPIED, *arguments(inputs, models))
    kill_second(process, models)
    output = finished(process, 60)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in output, output
    # from the first process, whether it notices or the launcher tells it
    assert "it goes on after the last saved state" in output, output
    assert not (models / NAME).exists()
    states = [path.name for path in (models / ".training" / "runs" / NAME).glob("step-*")]
    assert states == [f"step-{SAVE_EVERY:08d}"]
    output = finished(process := launched(COPIED, *arguments(inputs, models)), 300)
    assert process.returncode == 0, output
    # shown once, by the first process
    assert output.count("distilled for") == 1, output
    check_equal(models, distilled)


def kill_second(process: subprocess.Popen[str], models: Path) -> None:
    """Kill the second process between the first saved state and the next one."""
    log = models / ".training" / "runs" / NAME / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.is_file() and log.read_text().count('"loss"') > SAVE_EVERY):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    assert log.read_text().count('"loss"') < 2 * SAVE_EVERY, "too late to test anything"


def test_sharded_processes_equal_one(inputs: Path, models: Path, tmp_path: Path) -> None:
    """FSDP2 with frozen parameters in bf16: sharding, averages, states, gathering."""
    process = launched(SHARDED, *arguments(inputs, models, precision="bf16"))
    output = finished(process, 300)
    assert process.returncode == 0, output
    alone = tmp_path / "alone"
    work = distillation(inputs, alone)
    checkpoint = distill_here(work, dtype=torch.bfloat16)
    # in bf16, activations of a half batch fall to other codes than those of a whole one
    losses = torch.tensor([logged_values(models, "loss"), logged_values(alone, "loss")])
    assert (losses[0] / losses[1] - 1).abs().mean() < 0.03, losses
    written = QuantizedCheckpoint.read(models / NAME / f"{NAME}.safetensors")
    for report in (written.metadata.distillation, checkpoint.metadata.distillation):
        assert report is not None
        assert report.after_db > report.before_db
    assert logged_values(models, "sqnr_db") == pytest.approx(
        logged_values(alone, "sqnr_db"), abs=0.3
    )


def test_state_of_two_processes_is_gone_on_with_by_one(
    inputs: Path, distilled: Distilled, models: Path
) -> None:
    process = launched(SHARDED, *arguments(inputs, models))
    kill_second(process, models)
    finished(process, 60)
    work = distillation(inputs, models)
    steps: list[int] = []
    distill_here(work, lambda phase, done, total: steps.append(done) if phase[0] == "D" else None)
    assert steps == list(range(SAVE_EVERY, STEPS))
    check_equal(models, distilled)
