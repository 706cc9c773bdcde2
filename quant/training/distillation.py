"""Quantization-aware distillation: all blocks of a quantized model trained together.

The student learns the velocity that the original predicts on trajectories sampled from it, as in
the recipes "QAD" of NVIDIA's ModelOpt, with the rounding of this package (docs/adr/0012). Processes
are accelerate's: one, several with copies of the model (DDP), or several with a part each (FSDP2).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

from ..calibration import CalibrationSet, Conditioning
from ..errors.training import ForeignSourceError, NoGainError
from ..progress import Progress
from ..quantized_checkpoint import DistillationReport, QuantizedCheckpoint, finite_or_limit
from ..sources.source import FluxSource
from ..statistics_files import StatisticsFolder
from .accelerators import device_name
from .block_training import held_out_samples
from .distilled_checkpoint import DistilledWork, write_distilled
from .run_checkpoints import RunFolder
from .run_log import RunLog
from .student import quantized_student
from .trainer import DistillationOptions, Trainer
from .trajectories import distinct_prompts, prompts_digest, sample_trajectories
from .trajectory_files import TrajectoryFolder, TrajectoryPoints

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Distillation:
    """What is distilled into what.

    Attributes:
        source: The original.
        base: Quantized from it.
        samples: Their conditioning is what trajectories are sampled for.
        destination: The ``.safetensors`` file to write.
        options: Steps, batches, rates, trajectories.
        statistics: Folder of calibration statistics.
        folder: For trajectories and for the states of an unfinished run, shared by all processes.
        dtype: Type to compute in.
    """

    source: FluxSource
    base: QuantizedCheckpoint
    samples: CalibrationSet
    destination: Path
    options: DistillationOptions
    statistics: Path
    folder: Path
    dtype: torch.dtype

    @property
    def logs(self) -> Path:
        """Folder of the run, which outlives its states."""
        return self.folder / "runs" / self.destination.stem

    def job(self) -> dict[str, Any]:
        """Return what the result depends on, in words that a user knows."""
        trajectories = self.options.trajectories.model_dump(mode="json")
        training = self.options.training.model_dump(mode="json")
        others = self.options.model_dump(mode="json", exclude={"trajectories", "training"})
        # how often a state is saved and how a batch is cut changes nothing
        del others["save_every"], others["accumulate"]
        return {
            "original": self.source.digest(),
            "quantized checkpoint": self.base.metadata.content_digest,
            "prompts": prompts_digest(distinct_prompts(self.samples)),
            "precision": str(self.dtype),
            **training,
            **others,
            **{f"trajectories: {name}": value for name, value in trajectories.items()},
        }


def distilled_before(work: Distillation) -> QuantizedCheckpoint | None:
    """Return the checkpoint at the destination if distilling again would make the same."""
    if not work.destination.is_file():
        return None
    checkpoint = QuantizedCheckpoint.read(work.destination)
    report = checkpoint.metadata.distillation
    same = report is not None and report.job_digest == _digest(work.job())
    return checkpoint if same else None


def distill(
    work: Distillation, accelerator: Accelerator, restart: bool, progress: Progress
) -> QuantizedCheckpoint:
    """Train a quantized checkpoint and write the result; every process calls this.

    Interrupted at any moment, the same call goes on after the last saved state, with as many
    processes as there then are.

    Args:
        work: What to distill.
        accelerator: Of this process.
        restart: Begin anew, whatever an earlier run left.
        progress: Called before each block and step; may raise to cancel.

    Returns:
        The header of the written file.

    Raises:
        ForeignSourceError: The checkpoint was quantized from another original.
        CalibrationError: There is only one prompt, or prompts do not fit the model.
        ForeignRunError: An unfinished run of this name has other inputs or options.
        LaunchError: The batch cannot be divided among the processes.
        LossNotFiniteError: Training diverged; saved states are kept.
        NoGainError: The result would be no better; nothing is written.
        DiskFullError, FileWriteError: The system refuses to write.
    """
    metadata, options = work.base.metadata, work.options
    if metadata.source_digest != work.source.digest():
        raise ForeignSourceError(work.base.name, metadata.source_name, work.source.name)
    prompts = distinct_prompts(work.samples)
    folder = RunFolder(work.logs, accelerator)
    folder.open(work.destination.stem, work.job(), restart)
    points = _sampled(work, prompts, accelerator, progress)
    held_out = held_out_samples(len(prompts), timesteps=1)
    progress("Loading the student", 0, options.training.steps)
    student = quantized_student(work.source, work.base, work.dtype)
    trainer = Trainer(accelerator, student, points, held_out, options)
    before_db = trainer.sqnr_db()
    best_step = _train(trainer, before_db, folder, work, accelerator, progress)
    report = DistillationReport(
        steps=options.training.steps,
        best_step=best_step,
        batch=options.batch,
        samples=trainer.learned,
        held_out=len(held_out),
        before_db=finite_or_limit(before_db),
        after_db=finite_or_limit(trainer.sqnr_db()),
        base_digest=metadata.content_digest,
        job_digest=_digest(work.job()),
        reports="carried",
    )
    if not report.after_db > report.before_db:
        raise NoGainError(work.destination.stem, report.before_db, report.after_db)
    _write(work, trainer, report, accelerator, progress)
    folder.remove_states()
    accelerator.end_training()
    return QuantizedCheckpoint.read(work.destination)


def _sampled(
    work: Distillation,
    prompts: list[Conditioning],
    accelerator: Accelerator,
    progress: Progress,
) -> TrajectoryPoints:
    """Sample what is missing of the trajectories, each process its share of the files."""
    options = work.options.trajectories
    root = work.folder / "trajectories"
    folder = TrajectoryFolder(root, work.source.digest(), prompts, options, work.dtype)
    for file in range(accelerator.process_index, folder.files, accelerator.num_processes):
        if folder.holds(file):
            continue
        tell = partial(progress, "Sampling trajectories of the original", file, folder.files)
        device = device_name(accelerator)
        numbers = folder.numbers(file)
        points = sample_trajectories(
            work.source, prompts, numbers, options, device, work.dtype, tell
        )
        folder.write(file, points)
    waiting = "Waiting for trajectories that other processes sample"
    folder.wait(partial(progress, waiting, folder.files, folder.files))
    return folder.points()


def _train(
    trainer: Trainer,
    before_db: float,
    folder: RunFolder,
    work: Distillation,
    accelerator: Accelerator,
    progress: Progress,
) -> int:
    """Train to the end, then go back to the state that was best; return the steps before it.

    With few prompts a model begins to learn them by heart, and held-out prompts lose again.
    """
    steps, every = work.options.training.steps, work.options.save_every
    done = folder.last_step() or 0
    if done:
        folder.load(done, trainer.state)
        logger.info("Going on after step %d", done)
    log = RunLog(work.logs, accelerator, done)
    measured = {step: db for step, db in log.measured("sqnr_db").items() if step}
    if not done:
        log.add(0, sqnr_db=before_db)
    for step in range(done, steps):
        progress("Distilling", step, steps)
        log.add(step + 1, loss=trainer.step(step))
        if (step + 1) % every == 0 or step + 1 == steps:
            measured[step + 1] = trainer.sqnr_db()
            log.add(step + 1, sqnr_db=measured[step + 1])
            folder.save(step + 1, trainer.state, _best(measured))
    best = _best(measured)
    if best != steps:
        folder.load(best, trainer.state)
        logger.info("Of held-out prompts, the state after step %d was best", best)
    return best


def _best(measured: Mapping[int, float]) -> int:
    """Return the last of the steps whose value is largest."""
    return max(measured, key=lambda step: (measured[step], step))


def _write(
    work: Distillation,
    trainer: Trainer,
    report: DistillationReport,
    accelerator: Accelerator,
    progress: Progress,
) -> None:
    """Write in the first process what all of them gather."""
    metadata = work.base.metadata
    blocks = trainer.trained_blocks()
    if accelerator.is_main_process:
        statistics = StatisticsFolder(
            work.statistics, metadata.source_digest, metadata.calibration_digest
        )
        device = device_name(accelerator)
        writing = DistilledWork(
            work.source, work.base, work.destination, statistics, device, work.dtype
        )
        reports = "measured" if writing.measures else "carried"
        write_distilled(writing, blocks, report.model_copy(update={"reports": reports}), progress)
    else:
        for _ in blocks:
            pass
    accelerator.wait_for_everyone()


def _digest(job: Mapping[str, Any]) -> str:
    return blake3(json.dumps(job, sort_keys=True).encode()).hexdigest()
