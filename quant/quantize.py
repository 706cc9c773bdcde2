"""Checkpoint and calibration samples to quantized checkpoint, one block in memory at a time."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .auto_formats import choose_formats
from .block_quantizer import quantize_block
from .calibration import CalibrationSet
from .checkpoint_layout import Layout, checkpoint_layout, is_stored_quantized
from .checkpoint_writer import CheckpointWriter
from .errors import NoiseCheckpointError
from .flux.config import block_linears
from .modulation import stored_modulation
from .progress import Progress
from .quantized_checkpoint import (
    BlockReport,
    LinearReport,
    QuantizedCheckpoint,
    QuantizedMetadata,
    finite_or_limit,
)
from .recipe import Format, QuantizeOptions
from .sources.source import FluxSource
from .stack import (
    block_statistics,
    block_with_weights,
    check_finite,
    collect_statistics,
    compute_dtype,
)
from .statistics_files import StatisticsFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Work:
    """What every step of one quantization needs."""

    source: FluxSource
    calibration: CalibrationSet
    options: QuantizeOptions
    statistics: StatisticsFolder
    formats: Mapping[str, Format]
    device: str
    dtype: torch.dtype

    def job(self) -> str:
        """Return what the bytes of the result depend on, besides this package's version."""
        return json.dumps(
            {
                "source": self.source.digest(),
                "calibration": self.calibration.digest(),
                "options": self.options.model_dump(mode="json"),
                "formats": dict(self.formats),
                "dtype": str(self.dtype),
            }
        )


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
        dtype: Type to compute in; None takes ``compute_dtype(device)``.

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
        CheckpointBusyError: Another process is writing the same checkpoint.
    """
    started = time.monotonic()
    dtype = dtype or compute_dtype(device)
    folder = StatisticsFolder(statistics, source.digest(), calibration.digest())
    formats = _recipe_formats(source, options)
    # minutes of calibration later would be too late to find out
    CheckpointWriter(destination, checkpoint_layout(source, formats, options), "").check_disk()
    collect_statistics(source, calibration, folder, progress, device, dtype)
    _check_predicts(source, folder)
    if options.recipe.auto is not None:
        formats = choose_formats(source, folder, options, formats, progress, device, dtype)
    work = _Work(source, calibration, options, folder, formats, device, dtype)
    layout = checkpoint_layout(source, formats, options)
    blocks = source.config.block_names
    with CheckpointWriter(destination, layout, work.job()) as writer:
        for done, name in enumerate(blocks):
            if name in writer.finished:
                progress(f"Keeping {name}, finished earlier", done, len(blocks))
                continue
            heartbeat = partial(progress, f"Quantizing {name}", done, len(blocks))
            heartbeat()
            writer.finish_part(name, _write_block(name, work, layout, writer, heartbeat))
        progress("Copying high-precision tensors", len(blocks), len(blocks))
        _write_rest(work, layout, writer)
        writer.finish(_metadata(work, writer))
    seconds = time.monotonic() - started
    logger.info("Quantized %s to %s in %.1f s", source.name, destination.name, seconds)
    return QuantizedCheckpoint.read(destination)


def _write_block(
    name: str,
    work: _Work,
    layout: Layout,
    writer: CheckpointWriter,
    heartbeat: Callable[[], None],
) -> dict[str, object]:
    source = work.source
    tensors = source.submodule(name, work.device)
    linears = block_linears(name)
    quantized = quantize_block(
        name,
        block_with_weights(name, source.config, tensors, work.dtype),
        {linear: tensors[f"{linear}.weight"] for linear in linears},
        {linear: source.packed(f"{name}.{linear}", work.device) for linear in linears},
        block_statistics(work.statistics, name),
        work.options,
        {linear: work.formats[f"{name}.{linear}"] for linear in linears},
        source.config.head_dim,
        heartbeat,
    )
    for part, tensor in quantized.tensors.items():
        writer.add(f"{name}.{part}", tensor)
    kept = {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    written = {f"{name}.{linear}.weight" for linear in linears}
    _write_kept({k: v for k, v in kept.items() if k not in written}, work, layout, writer)
    return {
        "linears": [report.model_dump() for report in quantized.linears],
        "block": quantized.report.model_dump(),
    }


def _write_rest(work: _Work, layout: Layout, writer: CheckpointWriter) -> None:
    in_blocks = ("double_blocks.", "single_blocks.")
    for name in work.source.shapes:
        if not name.startswith(in_blocks):
            _write_kept(work.source.tensors([name]), work, layout, writer)


def _write_kept(
    tensors: Mapping[str, Tensor], work: _Work, layout: Layout, writer: CheckpointWriter
) -> None:
    check_finite(tensors)
    for name, tensor in tensors.items():
        if is_stored_quantized(name, work.options):
            for part, stored in stored_modulation(name, tensor, work.options.modulation).items():
                writer.add(part, stored)
        else:
            writer.add(name, tensor.to(layout[name][0]))


def _recipe_formats(source: FluxSource, options: QuantizeOptions) -> dict[str, Format]:
    names = _linear_names(source.config.block_names)
    return {name: options.recipe.format_of(name) for name in names}


def _linear_names(blocks: Iterable[str]) -> list[str]:
    return [f"{block}.{linear}" for block in blocks for linear in block_linears(block)]


def _check_predicts(source: FluxSource, folder: StatisticsFolder) -> None:
    """Refuse NVFP4 weights that were decoded in the wrong order: they predict nothing."""
    velocity_db = folder.velocity_sqnr_db()
    assert velocity_db is not None
    logger.info("%s predicts velocities at %.1f dB", source.name, velocity_db)
    if source.layout.endswith("nvfp4") and velocity_db <= 0:
        raise NoiseCheckpointError(source.name, source.layout, velocity_db)


def _metadata(work: _Work, writer: CheckpointWriter) -> QuantizedMetadata:
    source, calibration = work.source, work.calibration
    velocity_db = work.statistics.velocity_sqnr_db()
    notes = [writer.finished[name] for name in source.config.block_names]
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
        linears=tuple(LinearReport(**report) for note in notes for report in note["linears"]),
        blocks=tuple(BlockReport(**note["block"]) for note in notes),
    )
