"""Command `rebuild`: stale engines again, for what they were built for."""

from __future__ import annotations

import argparse
import sys

from .folders import existing_engine, model_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "engine",
        nargs="?",
        help="name of an engine: CHECKPOINT/TARGET (default: all stale ones)",
    )


def run(chosen: argparse.Namespace) -> int:
    """Export where that is needed, and build; one engine that fails keeps no other from it."""
    from functools import partial

    from ..quant.inventory import stored_checkpoints
    from ..quant.model_folders import checkpoint_file
    from ..quant.onnx_export import export_missing
    from ..trt_runtime.rebuild import rebuild_stale
    from .progress import CommandProgress

    folders = model_folders(chosen.models)
    only = None if chosen.engine is None else [existing_engine(folders, chosen.engine)]
    results = []
    with CommandProgress() as progress:
        for stored in stored_checkpoints(folders):
            export = partial(export_missing, checkpoint_file(stored.folder), progress)
            digest = stored.content_digest
            results += rebuild_stale(stored.folder, digest, export, progress, only)
    for result in results:
        if result.fault:
            print(f"{result.name} was not built: {result.fault}", file=sys.stderr)
        else:
            print(f"{result.name} was built again: {result.reason}")
    if not results:
        print(f"{chosen.engine or 'Every engine'} is up to date.")
    return 1 if any(result.fault for result in results) else 0
