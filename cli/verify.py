"""Command `verify`: every digest of a quantized checkpoint, or of an engine with all beside it."""

from __future__ import annotations

import argparse
import sys

from .folders import existing_checkpoint, existing_engine, model_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "name", help="name of a quantized checkpoint, or of an engine: CHECKPOINT/TARGET"
    )


def run(chosen: argparse.Namespace) -> int:
    """Check everything; each fault is one line on standard error."""
    return _engine(chosen) if "/" in chosen.name else _checkpoint(chosen)


def _checkpoint(chosen: argparse.Namespace) -> int:
    from ..quant.content_digest import check_content
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from .progress import CommandProgress

    checkpoint = existing_checkpoint(model_folders(chosen.models), chosen.name)
    with CommandProgress() as progress:
        check_content(QuantizedCheckpoint.read(checkpoint), progress)
    print(f"{chosen.name}: all tensors as recorded")
    return 0


def _engine(chosen: argparse.Namespace) -> int:
    from ..quant.inventory import stored_checkpoint
    from ..quant.model_folders import holds_checkpoint
    from ..trt_runtime.engine_verification import verify_everything
    from .progress import CommandProgress

    folder = existing_engine(model_folders(chosen.models), chosen.name)
    has_checkpoint = holds_checkpoint(folder.parent)
    digest = stored_checkpoint(folder.parent).content_digest if has_checkpoint else None
    with CommandProgress() as progress:
        found = verify_everything(folder, digest, progress)
    for fault in found.faults:
        print(fault, file=sys.stderr)
    verdict = f"{len(found.faults)} faults" if found.faults else "all as recorded"
    print(f"{chosen.name}: {found.plans} plans checked, {verdict}")
    return 1 if found.faults else 0
