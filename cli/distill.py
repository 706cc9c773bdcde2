"""Command `qad`: a quantized checkpoint trained against its original, under `accelerate launch`."""

from __future__ import annotations

import argparse
import signal
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from .errors import OptionError, StoppedError
from .folders import existing_checkpoint, model_folders, new_checkpoint

if TYPE_CHECKING:
    from ..quant.training.distillation import Distillation
    from ..quant.training.trainer import DistillationOptions

EPILOG = """One process: python -m flux_fp4 qad ...
Several: accelerate launch --config_file quant/training/configs/8gpu.yaml -m flux_fp4 qad ...
See docs/training.md. The same command goes on with an interrupted run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "source", type=Path, help="the original: what the quantized checkpoint was made from"
    )
    parser.add_argument("checkpoint", help="name of the quantized checkpoint in --models")
    parser.add_argument("destination", help="name of the checkpoint to be made in --models")
    parser.add_argument(
        "--samples",
        type=Path,
        required=True,
        metavar="FILE",
        help="what 'FLUX Calibration Samples' saved; each of its prompts is sampled, and one in "
        "eight is held out to judge by",
    )
    _add_training(parser.add_argument_group("training"))
    _add_trajectories(parser.add_argument_group("trajectories of the original"))
    _add_run(parser.add_argument_group("run"))


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", type=int, default=1000, help="optimizer steps (default: 1000)")
    group.add_argument(
        "--batch",
        type=int,
        default=32,
        help="samples of one step, over all processes together (default: 32)",
    )
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="compute each process's share in N parts, to save memory (default: 1)",
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        default=3e-3,
        metavar="RATE",
        help="of values behind codes, in steps between codes (default: 0.003)",
    )
    group.add_argument(
        "--relative-learning-rate",
        type=float,
        default=1e-3,
        metavar="RATE",
        help="of block scales, biases and branches, in parts of their size (default: 0.001)",
    )
    group.add_argument(
        "--ema",
        type=float,
        default=0.99,
        metavar="DECAY",
        help="of the moving average that is kept in the end; 0 keeps the last step (default: 0.99)",
    )


def _add_trajectories(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--trajectories", type=int, default=256, metavar="N", help="how many (default: 256)"
    )
    group.add_argument(
        "--sampling-steps", type=int, default=20, metavar="N", help="of each (default: 20)"
    )
    group.add_argument(
        "--points",
        type=int,
        default=4,
        metavar="N",
        help="steps kept of each, spread over the schedule (default: 4)",
    )
    group.add_argument(
        "--resolution", default="1024x1024", metavar="WxH", help="in pixels (default: 1024x1024)"
    )
    group.add_argument("--seed", type=int, default=0, help="of noise and order (default: 0)")


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--save-every",
        type=int,
        default=100,
        metavar="N",
        help="steps between two states on disk, and between two looks at held-out prompts "
        "(default: 100)",
    )
    group.add_argument("--restart", action="store_true", help="do not go on with an earlier run")
    group.add_argument("--tracker", choices=("tensorboard", "wandb"), help="also log to it")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    group.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "bf16", "fp32"),
        help="of what is not trained (default: bf16 where matrix units multiply it)",
    )


def run(chosen: argparse.Namespace) -> int:
    """Distill, unless the destination is up to date."""
    from ..quant.summary import quantized_summary
    from ..quant.training.accelerators import open_accelerator, peers_named
    from ..quant.training.distillation import distill, distilled_before
    from .progress import CommandProgress

    device = _device(chosen.device)
    work = _work(chosen, device)
    accelerator = open_accelerator(device, chosen.accumulate, chosen.tracker, work.logs)
    quantized = None if chosen.restart else distilled_before(work)
    if quantized is None:
        if chosen.tracker:
            accelerator.init_trackers("flux_fp4_qad", config=work.job())
        signal.signal(signal.SIGTERM, partial(_stop, accelerator.process_index))
        with peers_named(accelerator), CommandProgress(accelerator.is_main_process) as progress:
            quantized = distill(work, accelerator, chosen.restart, progress)
    if accelerator.is_main_process:
        print(quantized_summary(quantized))
    return 0


def _stop(process: int, number: int, frame: FrameType | None) -> None:
    # only once: what cleans up is not to be interrupted
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise StoppedError(process)


def _work(chosen: argparse.Namespace, device: str) -> Distillation:
    import torch

    from ..quant.calibration_files import load_samples
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from ..quant.sources.source import open_source
    from ..quant.stack import compute_dtype
    from ..quant.training.distillation import Distillation

    folders = model_folders(chosen.models)
    if chosen.destination == chosen.checkpoint:
        raise OptionError("destination", "it would replace the checkpoint that is trained")
    destination = new_checkpoint(folders, chosen.destination)
    options = _options(chosen)
    precision = {"bf16": torch.bfloat16, "fp32": torch.float32}
    return Distillation(
        source=open_source(chosen.source),
        base=QuantizedCheckpoint.read(existing_checkpoint(folders, chosen.checkpoint)),
        samples=load_samples(chosen.samples),
        destination=destination,
        options=options,
        statistics=folders.statistics,
        folder=folders.training,
        dtype=precision.get(chosen.precision, compute_dtype(device)),
    )


def _options(chosen: argparse.Namespace) -> DistillationOptions:
    from pydantic import ValidationError

    from ..quant.recipe import TrainingOptions
    from ..quant.training.trainer import DistillationOptions
    from ..quant.training.trajectories import TrajectoryOptions

    width, height = _size(chosen.resolution)
    try:
        return DistillationOptions(
            training=TrainingOptions(
                steps=chosen.steps,
                learning_rate=chosen.learning_rate,
                relative_learning_rate=chosen.relative_learning_rate,
            ),
            batch=chosen.batch,
            accumulate=chosen.accumulate,
            average=chosen.ema,
            save_every=chosen.save_every,
            seed=chosen.seed,
            trajectories=TrajectoryOptions(
                count=chosen.trajectories,
                sampling_steps=chosen.sampling_steps,
                kept=chosen.points,
                width=width,
                height=height,
                seed=chosen.seed,
            ),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][-1]) if first["loc"] else "kept"
        option = _OPTIONS.get(field, f"--{field}".replace("_", "-"))
        raise OptionError(option, f"{first['msg']} (it is {first['input']})") from error


_OPTIONS = {
    "average": "--ema",
    "count": "--trajectories",
    "kept": "--points",
    "width": "--resolution",
    "height": "--resolution",
}
"""Options whose fields have other names."""


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise OptionError("--resolution", f"'{text}' is not of the form 1024x1024")
    return int(width), int(height)


def _device(chosen: str) -> str:
    import torch

    usable = torch.cuda.is_available()
    if chosen == "cuda" and not usable:
        raise OptionError("--device", "torch finds no CUDA GPU")
    return "cuda" if usable and chosen != "cpu" else "cpu"
