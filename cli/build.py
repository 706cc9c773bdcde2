"""Command `build`: ONNX files to an engine."""

from __future__ import annotations

import argparse
import math

from ..trt_runtime.targets import TARGETS, build_spec
from .folders import existing_checkpoint, model_folders, run_history


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("checkpoint", help="name of an exported checkpoint in --models")
    listed = "; ".join(f"{name}: {gpus}" for name, (gpus, _, _) in TARGETS.items())
    parser.add_argument(
        "--target", default="sm120", choices=list(TARGETS), metavar="TARGET", help=listed
    )
    parser.add_argument(
        "--megapixels",
        type=_finite,
        default=2.0,
        help="largest picture, in units of 1024 x 1024 pixels (default: 2)",
    )
    parser.add_argument("--batch", type=int, default=1, help="pictures per call (default: 1)")
    parser.add_argument("--text-tokens", type=int, default=512, help="longest text (default: 512)")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="build processes, about 1 GB each (default: 0, by free cores and memory)",
    )


def run(chosen: argparse.Namespace) -> int:
    """Build what is missing."""
    from ..trt_runtime.builder import build_engine
    from ..trt_runtime.summary import engine_summary
    from .progress import CommandProgress

    folders = model_folders(chosen.models)
    checkpoint = existing_checkpoint(folders, chosen.checkpoint)
    spec = build_spec(chosen.target, chosen.megapixels, chosen.batch, chosen.text_tokens)
    with CommandProgress() as progress, run_history(folders).recording() as record:
        manifest = build_engine(checkpoint.parent, spec, progress, chosen.workers, record)
    print(engine_summary(f"{chosen.checkpoint}/{spec.folder_name}", manifest))
    return 0


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
