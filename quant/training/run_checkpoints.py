"""States of an unfinished distillation on disk, from which it goes on with any number of processes.

They are torch's distributed checkpoints: each process writes its shard, and each reads the parts
that it needs, however many processes there were. Frozen parameters are not in them, and neither is
any random state: the order of samples depends on the step alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ..errors.files import FileWriteError
from ..errors.training import ForeignRunError
from ..whole_files import make_folder, sync_folder, whole_file
from .ema import ExponentialAverage, trained_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

_STEP = re.compile(r"step-(\d{8})")
_UNFINISHED = ".unfinished"
_RUN = "run.json"

logger = logging.getLogger(__name__)


class RunFolder:
    """The folder of one distillation; its states are named by their steps.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self._accelerator = path, accelerator

    def open(self, name: str, job: Mapping[str, Any], restart: bool) -> None:
        """Take up an earlier run of the same job, or begin one.

        Args:
            name: Of the checkpoint to be made, for errors.
            job: What the result depends on.
            restart: Delete what an earlier run left.

        Raises:
            ForeignRunError: An earlier run is there, and is one of another job.
        """
        if self._accelerator.is_main_process:
            if restart and self.path.is_dir():
                shutil.rmtree(self.path)
            make_folder(self.path)
            shutil.rmtree(self.path / _UNFINISHED, ignore_errors=True)
            if self.last_step() is None:
                with whole_file(self.path / _RUN) as file:
                    file.write(json.dumps(job, indent=1).encode())
        self._accelerator.wait_for_everyone()
        stored = json.loads((self.path / _RUN).read_text(encoding="utf-8"))
        for option in {**stored, **job}:
            if stored.get(option) != job.get(option):
                raise ForeignRunError(name, option, stored.get(option), job.get(option))

    def last_step(self) -> int | None:
        """Return how many steps the newest whole state has behind it; None without one."""
        steps = [
            int(match[1]) for p in self.path.glob("step-*") if (match := _STEP.fullmatch(p.name))
        ]
        return max(steps, default=None)

    def save(self, step: int, state: TrainingState, best: int) -> None:
        """Write the state after a step; it takes its name when every process has written its part.

        Args:
            step: Steps before it.
            state: Of the run.
            best: Steps before the state that is kept beside it, if it is another one.

        Raises:
            FileWriteError: The system refuses to write.
        """
        unfinished = self.path / _UNFINISHED
        with _writing(unfinished), _alone() as alone:
            state_dict_saver.save(state.tensors(), checkpoint_id=unfinished, no_dist=alone)
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            kept = self._folder(best)
            former = [folder for folder in self.path.glob("step-*") if folder != kept]
            unfinished.rename(self._folder(step))
            sync_folder(self.path)
            for folder in former:
                shutil.rmtree(folder)
        self._accelerator.wait_for_everyone()
        logger.info("Saved the state after step %d", step)

    def load(self, step: int, state: TrainingState) -> None:
        """Read the state after a step into the model and everything beside it."""
        tensors = state.tensors()
        folder = self._folder(step)
        with _alone() as alone:
            state_dict_loader.load(tensors, checkpoint_id=folder, no_dist=alone)
        state.take_optimizer(tensors["optimizer"])

    def remove_states(self) -> None:
        """Delete the states of a run that is over; its logs stay."""
        if self._accelerator.is_main_process:
            for folder in self.path.glob("step-*"):
                shutil.rmtree(folder)
            (self.path / _RUN).unlink()
        self._accelerator.wait_for_everyone()

    def _folder(self, step: int) -> Path:
        return self.path / f"step-{step:08d}"


class TrainingState:
    """What a step changes: trained parameters, their average, the optimizer."""

    def __init__(
        self,
        model: nn.Module,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: ExponentialAverage,
    ) -> None:
        """Name the parts.

        Args:
            model: As accelerate prepared it.
            student: What it prepared.
            optimizer: Of torch, of the prepared model.
            average: Of the student.
        """
        self._model, self._student = model, student
        self._optimizer, self._average = optimizer, average

    def tensors(self) -> dict[str, Any]:
        """Return all of it; reading a state writes into these tensors."""
        parameters = trained_parameters(self._student)
        optimizer = get_optimizer_state_dict(self._model, self._optimizer, options=_OPTIONS)
        return {
            "student": {name: parameter.detach() for name, parameter in parameters.items()},
            "average": self._average.averages,
            "optimizer": optimizer,
        }

    def take_optimizer(self, optimizer: dict[str, Any]) -> None:
        """Set the optimizer's state, which torch keeps elsewhere than in its tensors."""
        set_optimizer_state_dict(
            self._model, self._optimizer, optim_state_dict=optimizer, options=_OPTIONS
        )


_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        # torch collects what went wrong in every process
        reason = "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
        raise FileWriteError(path.name, path.parent.name, reason) from error


@contextlib.contextmanager
def _alone() -> Iterator[bool]:
    """Tell whether this is the only process, of which torch 2.11 warns although it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield not dist.is_initialized()
