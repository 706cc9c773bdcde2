"""Distilling a tiny model in this process, and the same through the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from flux_fp4.quant.calibration_files import load_samples
from flux_fp4.quant.progress import Progress
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.recipe import TrainingOptions
from flux_fp4.quant.sources.source import open_source
from flux_fp4.quant.training.accelerators import open_accelerator
from flux_fp4.quant.training.distillation import Distillation, distill
from flux_fp4.quant.training.trainer import DistillationOptions
from flux_fp4.quant.training.trajectories import TrajectoryOptions
from tiny_flux import ignore_progress

STEPS, SAVE_EVERY, BATCH = 24, 8, 8
TRAJECTORIES = TrajectoryOptions(count=64, sampling_steps=4, kept=2, width=64, height=64)
OPTIONS = DistillationOptions(
    training=TrainingOptions(steps=STEPS),
    batch=BATCH,
    save_every=SAVE_EVERY,
    trajectories=TRAJECTORIES,
)
NAME = "distilled"


@dataclass(frozen=True)
class Distilled:
    """An uninterrupted run of one process: its models folder and what it wrote."""

    models: Path
    checkpoint: QuantizedCheckpoint


def distillation(inputs: Path, models: Path, **changes: Any) -> Distillation:
    """What is distilled: files of ``inputs`` (see the fixture) into a models folder."""
    return Distillation(
        source=open_source(inputs / "source.safetensors"),
        base=QuantizedCheckpoint.read(inputs / "models" / "tiny" / "tiny.safetensors"),
        samples=load_samples(inputs / "mine.samples.safetensors"),
        destination=models / NAME / f"{NAME}.safetensors",
        options=OPTIONS.model_copy(update=changes),
        statistics=inputs / "models" / ".statistics",
        folder=models / ".training",
        dtype=torch.float64,  # see distill_in_fp64
    )


def distill_here(
    work: Distillation, progress: Progress = ignore_progress, restart: bool = False, **changes: Any
) -> QuantizedCheckpoint:
    """Distill in one process, this one."""
    # accelerate keeps one state for the whole life of a process
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    work = replace(work, **changes)
    accelerator = open_accelerator("cpu", work.options.accumulate, None, work.logs)
    return distill(work, accelerator, restart, progress)


def arguments(inputs: Path, models: Path, **changes: object) -> list[str]:
    """The command line of the same work; ``models`` holds a copy of the quantized checkpoint."""
    options = {
        "samples": inputs / "mine.samples.safetensors",
        "models": models,
        "steps": STEPS,
        "batch": BATCH,
        "save-every": SAVE_EVERY,
        "trajectories": TRAJECTORIES.count,
        "sampling-steps": TRAJECTORIES.sampling_steps,
        "points": TRAJECTORIES.kept,
        "resolution": f"{TRAJECTORIES.width}x{TRAJECTORIES.height}",
        "precision": "auto",
        "device": "cpu",
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    named = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["qad", str(inputs / "source.safetensors"), "tiny", NAME, *named]


def logged(models: Path, value: str) -> list[float]:
    """What a run noted, in the order of its steps."""
    lines = (models / ".training" / "runs" / NAME / "log.jsonl").read_text().splitlines()
    return [entry[value] for line in lines if value in (entry := json.loads(line))]
