"""The loop of distillation: steps, averages and the measure that decides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..errors.training import LaunchError, LossNotFiniteError
from ..recipe import TrainingOptions
from .batch_order import BatchOrder, padded_batches
from .ema import ExponentialAverage
from .optimizer import BETAS, parameter_groups, rate
from .run_checkpoints import TrainingState
from .student import Student
from .trainable import trained_tensors
from .trajectories import TrajectoryOptions
from .trajectory_files import TrajectoryPoints

if TYPE_CHECKING:
    from accelerate import Accelerator


class DistillationOptions(BaseModel):
    """What the user chooses about distillation.

    Attributes:
        training: Steps and learning rates.
        batch: Samples of one step, over all processes together.
        accumulate: Parts in which each process computes its share of a batch.
        average: Decay of the average of parameters that is kept in the end; 0 keeps the last step.
        save_every: Steps between two states on disk; as often the held-out prompts are looked at.
        seed: Of the order of samples.
        trajectories: What is learned from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    training: TrainingOptions = TrainingOptions(steps=1000)
    batch: int = Field(default=32, ge=1, le=65536)
    accumulate: int = Field(default=1, ge=1, le=65536)
    average: float = Field(default=0.99, ge=0, lt=1)
    save_every: int = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    trajectories: TrajectoryOptions = TrajectoryOptions()


class Trainer:
    """A student in training, in one process of several.

    Attributes:
        state: What a step changes, to be saved and loaded.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: Student,
        points: TrajectoryPoints,
        held_out: Sequence[int],
        options: DistillationOptions,
    ) -> None:
        """Shard or copy the student as accelerate is configured.

        Args:
            accelerator: Of this process.
            student: On the CPU.
            points: What the original predicts.
            held_out: Numbers of the prompts to judge by.
            options: Steps, batches and rates.

        Raises:
            LaunchError: The batch cannot be divided among the processes.
        """
        self._accelerator, self._student, self._points = accelerator, student, points
        self._options = options
        self._share = _share(options, accelerator.num_processes)
        judged = set(held_out)
        numbered = range(len(points))
        self._held_out = [index for index in numbered if points.prompts[index] in judged]
        learned = {i: points.shapes[i] for i in numbered if points.prompts[i] not in judged}
        self.learned = len(learned)
        self._order = BatchOrder(learned, options.batch, options.seed)
        optimizer = torch.optim.Adam(parameter_groups(student, options.training), betas=BETAS)
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._model, self._optimizer = accelerator.prepare(student, optimizer)
        self._average = ExponentialAverage(student, options.average)
        self.state = TrainingState(self._model, student, optimizer, self._average)

    def step(self, step: int) -> float:
        """Learn from one batch.

        Args:
            step: Steps before it.

        Returns:
            Noise by signal, mean over the batch.

        Raises:
            LossNotFiniteError: It is NaN or infinite.
        """
        accelerator = self._accelerator
        factor = rate(step, self._options.training.steps)
        for group, full in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = factor * full
        batch = self._order.batch(step)[accelerator.process_index :: accelerator.num_processes]
        total = torch.zeros((), device=accelerator.device)
        for start in range(0, len(batch), self._share):
            with accelerator.accumulate(self._model):
                loss = self._losses(batch[start : start + self._share]).mean()
                accelerator.backward(loss)
                self._optimizer.step()
                self._optimizer.zero_grad()
            total += loss.detach() / self._options.accumulate
        mean = float(accelerator.reduce(total, "mean"))
        if not math.isfinite(mean):
            raise LossNotFiniteError(step + 1, mean)
        self._average.update(step)
        return mean

    @torch.no_grad()
    def sqnr_db(self) -> float:
        """Return the SQNR of the average's velocity for held-out prompts, all samples together."""
        accelerator = self._accelerator
        rank, processes = accelerator.process_index, accelerator.num_processes
        energies = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        size = self._share * processes
        with self._average.applied():
            for indices, counts in padded_batches(self._held_out, self._points.shapes, size):
                expected, actual = self._velocities(indices[rank::processes])
                noise = (actual - expected).double().square().sum(dim=(1, 2))
                signal = expected.double().square().sum(dim=(1, 2))
                mine = torch.tensor(counts[rank::processes], device=accelerator.device)
                energies += torch.stack((signal[mine].sum(), noise[mine].sum()))
        signal_sum, noise_sum = accelerator.reduce(energies, "sum").tolist()
        return 10 * math.log10(signal_sum / noise_sum) if noise_sum else math.inf

    def trained_blocks(self) -> Iterator[dict[str, Tensor]]:
        """Yield what training changed of each block, as a checkpoint stores it.

        Blocks are gathered one by one, and every process has to take part.
        """
        with self._average.applied():
            for block in self._student.blocks:
                if isinstance(block, FSDPModule):
                    block.unshard()
                yield trained_tensors(block.block)  # type: ignore[arg-type]
                if isinstance(block, FSDPModule):
                    block.reshard()

    def _losses(self, indices: Sequence[int]) -> Tensor:
        """Return noise by signal of each sample: steps of small velocities count like others."""
        expected, actual = self._velocities(indices)
        noise = (actual - expected).square().mean(dim=(1, 2))
        return noise / expected.square().mean(dim=(1, 2))

    def _velocities(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        samples = [self._points[index] for index in indices]
        patch = self._student.config.patch_size
        expected = torch.cat([sample.velocity_patches(patch) for sample in samples])
        return expected.to(self._accelerator.device), self._model(samples).float()


def _share(options: DistillationOptions, processes: int) -> int:
    """Return how many samples a process computes at once."""
    share, rest = divmod(options.batch, processes * options.accumulate)
    if rest:
        raise LaunchError(
            f"a batch of {options.batch} is to be divided among {processes} processes with "
            f"{options.accumulate} parts each",
            "that leaves a rest",
            f"Set --batch to a multiple of {processes * options.accumulate}.",
        )
    return share
