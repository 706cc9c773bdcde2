"""Writing one ONNX file per block beside the checkpoint whose bytes they point into.

ONNX external data must lie in the model's own folder (the checker, ONNX Runtime and TensorRT's
parser refuse ``..`` and links), so checkpoint and ONNX files share one.
"""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from ..durations import EXPORT
from ..errors.export import OnnxExportMissingError
from ..progress import Progress, Record, unrecorded
from ..quantized_checkpoint import QuantizedCheckpoint
from ..whole_files import only_writer, whole_file
from .blocks import block_model
from .contract import PLAIN, Variant, contract_metadata

logger = logging.getLogger(__name__)


def export_blocks(
    checkpoint: Path, progress: Progress, record: Record = unrecorded
) -> tuple[Path, ...]:
    """Export every block of a quantized checkpoint, and its variants beside it.

    Variants take LoRA factors, an attention mask, or both. Changed blocks have a LoRA in their
    weights already, and get no variant for that.

    Each file is checked with ``onnx.checker`` (full check) under a temporary name before it takes
    its own, so an interrupted export leaves whole files only.

    Args:
        checkpoint: The quantized checkpoint.
        progress: Called before each block; may raise to cancel.
        record: Told how long each block took.

    Returns:
        The ONNX files in the order in which samples pass through the blocks, without variants.

    Raises:
        QuantizedCheckpointError: The file is no quantized checkpoint of this version.
        DiskFullError, FileWriteError: The system refuses to write.
    """
    started = time.monotonic()
    header = QuantizedCheckpoint.read(checkpoint)
    blocks = header.metadata.block_names
    paths = []
    with only_exporter(checkpoint, progress):
        for done, block in enumerate(blocks):
            progress(f"Exporting {block}", done, len(blocks))
            begun, variants = time.monotonic(), _variants(header)
            for variant in variants:
                path = onnx_path(checkpoint, block, variant)
                write_checked(block_model(header, block, variant), path)
            record(EXPORT, len(variants), time.monotonic() - begun)
            paths.append(onnx_path(checkpoint, block))
    progress("Exported", len(blocks), len(blocks))
    seconds = time.monotonic() - started
    logger.info("Exported %d blocks of %s in %.1f s", len(blocks), checkpoint.name, seconds)
    return tuple(paths)


def export_missing(checkpoint: Path, progress: Progress) -> tuple[Path, ...]:
    """Export a checkpoint unless the ONNX files beside it are complete and its own.

    Raises as ``export_blocks`` does.
    """
    try:
        return exported_blocks(checkpoint)
    except OnnxExportMissingError:
        return export_blocks(checkpoint, progress)


def exported_blocks(checkpoint: Path) -> tuple[Path, ...]:
    """Return the ONNX files of a checkpoint if they and their variants are complete and its own.

    Raises:
        OnnxExportMissingError: A file is absent or was exported from other tensors.
    """
    header = QuantizedCheckpoint.read(checkpoint)
    paths = []
    for block in header.metadata.block_names:
        for variant in _variants(header):
            path = onnx_path(checkpoint, block, variant)
            if not path.is_file():
                raise OnnxExportMissingError(header.name, f"'{path.name}' is missing")
            try:
                model = onnx.load(path, load_external_data=False)
            except DecodeError as error:
                raise OnnxExportMissingError(header.name, f"'{path.name}' is damaged") from error
            found = {entry.key: entry.value for entry in model.metadata_props}
            if found != contract_metadata(header, block, variant):
                raise OnnxExportMissingError(header.name, f"'{path.name}' is of another checkpoint")
        paths.append(onnx_path(checkpoint, block))
    return tuple(paths)


def _variants(header: QuantizedCheckpoint) -> tuple[Variant, ...]:
    loras = (False, True) if header.metadata.base_digest is None else (False,)
    return tuple(Variant(lora, mask) for lora in loras for mask in (False, True))


def onnx_path(checkpoint: Path, block: str, variant: Variant = PLAIN) -> Path:
    """Return where the ONNX file of a block or of one of its variants lies."""
    return checkpoint.with_name(f"{variant.name_of(block)}.onnx")


def only_exporter(checkpoint: Path, progress: Progress) -> AbstractContextManager[None]:
    """Hold the lock of a checkpoint's ONNX files; waits for another export with progress."""
    waiting = partial(progress, "Waiting for another export of this checkpoint", 0, 1)
    return only_writer(checkpoint.with_name(".onnx.lock"), checkpoint.parent, ".+", waiting)


def write_checked(model: ir.Model, path: Path) -> None:
    """Write a model, check it in full, and only then give it its name.

    Raises:
        DiskFullError, FileWriteError: The system refuses to write.
    """
    # external tensors stay external: nothing of the checkpoint is copied
    data = ir.to_proto(model).SerializeToString()
    with whole_file(path, len(data)) as file:
        file.write(data)
        file.flush()
        onnx.checker.check_model(str(file.name), full_check=True)
