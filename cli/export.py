"""Command `export`: a quantized checkpoint to ONNX files."""

from __future__ import annotations

import argparse

from .folders import existing_checkpoint, model_folders, run_history


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("checkpoint", help="name of a quantized checkpoint in --models")
    parser.add_argument(
        "--whole-transformer",
        action="store_true",
        help="also write one ONNX file of the whole transformer, for other runtimes",
    )


def run(chosen: argparse.Namespace) -> int:
    """Write the ONNX files beside the checkpoint."""
    folders = model_folders(chosen.models)
    checkpoint = existing_checkpoint(folders, chosen.checkpoint)

    from ..quant.onnx_export import export_blocks, export_transformer
    from .progress import CommandProgress

    with CommandProgress() as progress, run_history(folders).recording() as record:
        files = export_blocks(checkpoint, progress, record)
        if chosen.whole_transformer:
            files = (*files, export_transformer(checkpoint, progress))
    print(f"{chosen.checkpoint}: {len(files)} ONNX files in '{checkpoint.parent}'")
    return 0
