"""accelerate's `Accelerator`, opened so that training computes what will be packed.

Launching, process groups, sharding and trackers are accelerate's; this file only refuses what would
silently train something else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors.training import LaunchError, ProcessLostError, TrainingPackageError

if TYPE_CHECKING:
    from accelerate import Accelerator

PACKAGE = "accelerate>=1.6"
"""The first release whose FSDP2 support saves and loads optimizers."""

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""Packages by tracker, one of which it needs."""

_TIMEOUT = timedelta(hours=1)
"""Of collective calls: the first process writes blocks and reports while others wait."""


def open_accelerator(device: str, accumulate: int, tracker: str | None, logs: Path) -> Accelerator:
    """Join the processes that accelerate launched; started without it, this is the only one.

    Args:
        device: ``cpu``, or ``cuda`` for the GPU that the launcher gave to this process.
        accumulate: Batches whose gradients make one step.
        tracker: ``tensorboard``, ``wandb`` or None.
        logs: Folder for the tracker.

    Raises:
        TrainingPackageError: accelerate or the tracker is not installed.
        LaunchError: The launcher's configuration cannot train this model.
    """
    _check_packages(tracker)
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
        ProjectConfiguration,
    )

    accelerator = Accelerator(
        cpu=device == "cpu",
        # gradients of all parameters in fp32 on every GPU would undo sharding
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=accumulate, sync_with_dataloader=False, sync_each_batch=True
        ),
        log_with=tracker,
        project_config=ProjectConfiguration(project_dir=str(logs), logging_dir=str(logs)),
        kwargs_handlers=[
            # scales are the same everywhere, and never change
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=_TIMEOUT),
        ],
    )
    check_launch(accelerator)
    return accelerator


def check_launch(accelerator: Accelerator) -> None:
    """Refuse configurations of accelerate that would train something else than asked for.

    Raises:
        LaunchError: The configuration is one of them.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise LaunchError(
            f"{launched} processes were launched, and accelerate joins {accelerator.num_processes}",
            "each would train alone",
            "Add --device cpu to train on CPUs, or launch one process for each GPU.",
        )
    if accelerator.mixed_precision != "no":
        raise LaunchError(
            f"accelerate is configured for mixed precision {accelerator.mixed_precision}",
            "values behind codes would be rounded before they are coded",
            "Set mixed_precision to 'no': on a GPU, blocks compute in bf16 all the same.",
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if not hasattr(accelerator.state, "fsdp_plugin") or accelerator.state.fsdp_plugin is None:
        raise LaunchError(
            f"accelerate is configured for FSDP, and the device is {accelerator.device.type}",
            "accelerate shards models on GPUs only",
            "Launch without FSDP (accelerate launch --multi_gpu), or on a machine with GPUs.",
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
        raise LaunchError(
            f"accelerate is configured for FSDP {plugin.fsdp_version} with "
            f"fsdp_cpu_ram_efficient_loading {str(plugin.cpu_ram_efficient_loading).lower()}",
            "only FSDP 2 without it can shard frozen and trained parameters together",
            "Use a file of quant/training/configs.",
        )


def _check_packages(tracker: str | None) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise TrainingPackageError(PACKAGE, "Distillation of the whole model")
    if tracker is not None and not any(map(importlib.util.find_spec, TRACKERS[tracker])):
        raise TrainingPackageError(TRACKERS[tracker][0], f"Tracker '{tracker}'")


def device_name(accelerator: Accelerator) -> str:
    """Return the device of this process as loaders of files take it."""
    # accelerate numbers CPUs too
    return "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)


@contextlib.contextmanager
def peers_named(accelerator: Accelerator) -> Iterator[None]:
    """Tell the end of another process as an error of this package.

    Raises:
        ProcessLostError: A collective call failed.
    """
    try:
        yield
    except RuntimeError as error:
        # NCCL has a class for it; Gloo names only itself
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            raise ProcessLostError(accelerator.process_index, str(error)) from error
        raise
