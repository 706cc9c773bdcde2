"""Checkpoint and calibration samples to quantized checkpoint, one block in memory at a time."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import torch

from .auto_formats import choose_formats
from .block_writing import BlockWork, block_reports, write_blocks, write_kept
from .calibration import CalibrationSet
from .checkpoint_layout import Layout, checkpoint_layout, recipe_formats
from .checkpoint_writer import CheckpointWriter
from .durations import FINISH, IN_BLOCKS, bytes_outside
from .errors.sources import NoiseCheckpointError
from .progress import Progress, Record, unrecorded
from .quantized_checkpoint import QuantizedCheckpoint, QuantizedMetadata, finite_or_limit
from .recipe import QuantizeOptions
from .sources.source import FluxSource
from .stack import collect_statistics, compute_dtype, report_dtype
from .statistics_files import StatisticsFolder
from .training.trained_blocks import write_trained_blocks

logger = logging.getLogger(__name__)


@torch.inference_mode()
def quantize_checkpoint(
    source: FluxSource,
    destination: Path,
    calibration: CalibrationSet,
    options: QuantizeOptions,
    statistics: Path,
    progress: Progress,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    record: Record = unrecorded,
) -> QuantizedCheckpoint:
    """Quantize a FLUX transformer.

    Interrupted at any moment, by the progress callback or by a crash, the blocks that are done stay
    beside ``destination`` in a hidden file, and the same call goes on after them.

    Args:
        source: The weights.
        destination: The ``.safetensors`` file to write; replaced only when the new one is whole.
        calibration: Samples that fit the model.
        options: The recipe.
        statistics: Folder for calibration statistics, which every recipe shares.
        progress: Called before and after each block, and between samples; may raise to cancel.
        device: Where to compute.
        dtype: Type to compute in; None takes ``compute_dtype(device)``, and for what only the
            report depends on ``report_dtype``.
        record: Told how long each block took.

    Returns:
        The header of the written file.

    Raises:
        UnsupportedWeightError: A weight cannot be quantized by this recipe.
        CalibrationError: The samples do not fit.
        NotFiniteError: A weight or an activation is not finite.
        NoiseCheckpointError: Weights stored in NVFP4 decode to noise.
        FormatBudgetError: The budget of ``auto`` cannot be kept.
        FolderNotWritableError: No file can be made beside ``destination``.
        DiskFullError: The disk cannot hold the result.
        FileWriteError: The system refuses to write.
        CheckpointBusyError: Another process is writing the same checkpoint.
    """
    started = time.monotonic()
    measuring = dtype or report_dtype(device, options.recipe)
    dtype = dtype or compute_dtype(device)
    folder = StatisticsFolder(statistics, source.digest(), calibration.digest())
    formats = recipe_formats(source.config, options)
    # minutes of calibration later would be too late to find out
    CheckpointWriter(destination, checkpoint_layout(source, formats, options), "").check_disk()
    collect_statistics(source, calibration, folder, progress, device, dtype, record)
    _check_predicts(source, folder)
    if options.recipe.auto is not None:
        formats = choose_formats(source, folder, options, formats, progress, device, dtype, record)
    work = BlockWork(source, options, folder, formats, device, measuring)
    layout = checkpoint_layout(source, formats, options)
    blocks = source.config.block_names
    with CheckpointWriter(destination, layout, _job(work, calibration)) as writer:
        if options.recipe.training is not None:
            write_trained_blocks(blocks, work, calibration, layout, writer, progress, record)
        else:
            write_blocks(blocks, work, layout, writer, progress, record)
        progress("Copying high-precision tensors", len(blocks), len(blocks))
        finishing = time.monotonic()
        _write_rest(work, layout, writer)
        writer.finish(_metadata(work, calibration, writer))
        record(FINISH, bytes_outside(source), time.monotonic() - finishing)
    seconds = time.monotonic() - started
    logger.info("Quantized %s to %s in %.1f s", source.name, destination.name, seconds)
    return QuantizedCheckpoint.read(destination)


def _job(work: BlockWork, calibration: CalibrationSet) -> str:
    """Return what the bytes of the result depend on, besides this package's version."""
    return json.dumps(
        {
            "source": work.source.digest(),
            "calibration": calibration.digest(),
            "options": work.options.model_dump(mode="json"),
            "formats": dict(work.formats),
            "dtype": str(work.dtype),
        }
    )


def _write_rest(work: BlockWork, layout: Layout, writer: CheckpointWriter) -> None:
    for name in work.source.shapes:
        if not name.startswith(IN_BLOCKS):
            write_kept(work.source.tensors([name]), work, layout, writer)


def _check_predicts(source: FluxSource, folder: StatisticsFolder) -> None:
    """Refuse NVFP4 weights that were decoded in the wrong order: they predict nothing."""
    velocity_db = folder.velocity_sqnr_db()
    assert velocity_db is not None
    logger.info("%s predicts velocities at %.1f dB", source.name, velocity_db)
    if source.layout.endswith("nvfp4") and velocity_db <= 0:
        raise NoiseCheckpointError(source.name, source.layout, velocity_db)


def _metadata(
    work: BlockWork, calibration: CalibrationSet, writer: CheckpointWriter
) -> QuantizedMetadata:
    source = work.source
    velocity_db = work.statistics.velocity_sqnr_db()
    linears, blocks = block_reports(writer, source.config.block_names)
    return QuantizedMetadata(
        variant=source.config.variant,
        config=source.config,
        options=work.options,
        high_precision="bf16",
        calibration_digest=calibration.digest(),
        calibration_samples=len(calibration.samples),
        calibration_seed=calibration.seed,
        calibration_timesteps=calibration.timesteps,
        velocity_sqnr_db=None if velocity_db is None else finite_or_limit(velocity_db),
        source_name=source.name,
        source_layout=source.layout,
        source_bytes=source.size_bytes,
        source_digest=source.digest(),
        content_digest=writer.content_digest(),
        linears=linears,
        blocks=blocks,
    )
