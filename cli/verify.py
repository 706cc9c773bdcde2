"""Command `verify`: every digest of an engine, its variants and its bakes."""

from __future__ import annotations

import argparse
import sys

from .folders import existing_engine, model_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("engine", help="name of an engine in --models: CHECKPOINT/TARGET")


def run(chosen: argparse.Namespace) -> int:
    """Check everything; each fault is one line on standard error."""
    from ..quant.model_folders import checkpoint_file
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from ..trt_runtime.engine_verification import verify_everything
    from .progress import CommandProgress

    folder = existing_engine(model_folders(chosen.models), chosen.engine)
    path = checkpoint_file(folder.parent)
    digest = QuantizedCheckpoint.read(path).metadata.content_digest if path.is_file() else None
    with CommandProgress() as progress:
        found = verify_everything(folder, digest, progress)
    for fault in found.faults:
        print(fault, file=sys.stderr)
    verdict = f"{len(found.faults)} faults" if found.faults else "all as recorded"
    print(f"{chosen.engine}: {found.plans} plans checked, {verdict}")
    return 1 if found.faults else 0
