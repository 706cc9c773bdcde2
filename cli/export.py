"""Command `export`: a quantized checkpoint to ONNX files."""

from __future__ import annotations

import argparse

from .folders import existing_checkpoint, model_folders


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
    checkpoint = existing_checkpoint(model_folders(chosen.models), chosen.checkpoint)

    from ..quant.onnx_export import export_blocks, export_transformer
    from .progress import CommandProgress

    with CommandProgress() as progress:
        files = export_blocks(checkpoint, progress)
        if chosen.whole_transformer:
            files = (*files, export_transformer(checkpoint, progress))
    print(f"{chosen.checkpoint}: {len(files)} ONNX files in '{checkpoint.parent}'")
    return 0
