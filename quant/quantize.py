"""Checkpoint and calibration samples to quantized checkpoint, one block in memory at a time."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from blake3 import blake3

from .block_quantizer import quantize_block
from .calibration import CalibrationSet, SampleState, embedded_samples
from .checkpoint_writer import CheckpointWriter
from .flux.blocks import block_from_config
from .flux.config import block_linears
from .flux.model import Embedders
from .nvfp4 import NVFP4_BLOCK
from .progress import Progress
from .quantized_checkpoint import (
    BlockReport,
    LinearReport,
    QuantizedCheckpoint,
    QuantizedMetadata,
    is_in_plan,
)
from .recipe import QuantizeOptions
from .source_checkpoint import SourceCheckpoint

logger = logging.getLogger(__name__)

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]

_STORED_AS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.bfloat16}
"""dtype of what stays outside of plans. fp32 files are stored as bf16, FLUX's own precision."""


@torch.inference_mode()
def quantize_checkpoint(
    source: Path,
    destination: Path,
    calibration: CalibrationSet,
    options: QuantizeOptions,
    progress: Progress,
    device: str = "cpu",
) -> QuantizedCheckpoint:
    """Quantize a FLUX.1 checkpoint to NVFP4.

    Args:
        source: BFL or ComfyUI single-file checkpoint.
        destination: The ``.safetensors`` file to write; replaced only when the new one is whole.
        calibration: Samples that fit the model.
        options: The recipe.
        progress: Called before and after each block, and between samples; may raise to cancel,
            which leaves no file behind.
        device: Where to compute: fp32 on ``cpu``, bf16 elsewhere.

    Returns:
        The header of the written file.

    Raises:
        UnknownCheckpointError: ``source`` is no FLUX.1 transformer.
        UnsupportedWeightError: A weight cannot be held in NVFP4.
        CalibrationError: The samples do not fit.
        NotFiniteError: A weight or an activation is not finite.
        DiskFullError: The disk cannot hold the result.
    """
    started = time.monotonic()
    checkpoint = SourceCheckpoint(source)
    config = checkpoint.config
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    total = len(config.block_names)
    progress(f"Embedding {len(calibration.samples)} samples", 0, total)
    states = _embed(checkpoint, calibration, device, dtype)
    linears: list[LinearReport] = []
    blocks: list[BlockReport] = []
    layout = _layout(checkpoint, options)
    with CheckpointWriter(destination, layout) as writer:
        for done, name in enumerate(config.block_names):
            phase = f"Quantizing {name}"

            def heartbeat(phase: str = phase, done: int = done) -> None:
                progress(phase, done, total)

            block = block_from_config(name, config).to(device, dtype)
            tensors = checkpoint.submodule(name, device)
            block.load_state_dict(tensors)
            quantized, states = quantize_block(name, block, tensors, states, options, heartbeat)
            for part, tensor in quantized.tensors.items():
                writer.add(f"{name}.{part}", tensor)
            linears += quantized.linears
            blocks.append(quantized.report)
        progress("Copying high-precision tensors", total, total)
        _copy_high_precision(checkpoint, layout, writer)
        metadata = QuantizedMetadata(
            variant=config.variant,
            config=config,
            recipe=options.recipe,
            fp8_attention=options.fp8_attention,
            high_precision="bf16",
            calibration_digest=calibration.digest(),
            calibration_samples=len(calibration.samples),
            source_name=source.name,
            source_bytes=source.stat().st_size,
            source_digest=file_digest(source),
            content_digest=writer.content_digest(),
            linears=tuple(linears),
            blocks=tuple(blocks),
        )
        writer.finish(metadata)
    seconds = time.monotonic() - started
    logger.info("Quantized %s to %s in %.1f s", source.name, destination.name, seconds)
    return QuantizedCheckpoint.read(destination)


def file_digest(path: Path) -> str:
    """Return the blake3 digest of a file, read through the page cache."""
    return blake3().update_mmap(path).hexdigest()


def _embed(
    checkpoint: SourceCheckpoint, calibration: CalibrationSet, device: str, dtype: torch.dtype
) -> list[SampleState]:
    embedders = Embedders(checkpoint.config).to(device, dtype)
    names = {name: name for name in embedders.state_dict()}
    embedders.load_state_dict(checkpoint.tensors(names, device))
    return embedded_samples(calibration, embedders, checkpoint.config)


def _layout(checkpoint: SourceCheckpoint, options: QuantizeOptions) -> Layout:
    layout: Layout = {}
    for name, shape in checkpoint.shapes.items():
        layout[name] = (_stored_dtype(checkpoint, name), shape)
    for block in checkpoint.config.block_names:
        for linear in block_linears(block):
            name = f"{block}.{linear}"
            rows, columns = checkpoint.shapes[f"{name}.weight"]
            layout[f"{name}.weight"] = (torch.uint8, (rows, columns // 2))
            scale_shape = (rows, columns // NVFP4_BLOCK)
            layout[f"{name}.weight_scale"] = (torch.float8_e4m3fn, scale_shape)
            layout[f"{name}.weight_scale_2"] = (torch.float32, ())
            layout[f"{name}.input_scale"] = (torch.float32, ())
        if options.fp8_attention:
            for part in ("q_scale", "k_scale", "v_scale"):
                layout[f"{block}.attention.{part}"] = (torch.bfloat16, ())
    return layout


def _copy_high_precision(
    checkpoint: SourceCheckpoint, layout: Layout, writer: CheckpointWriter
) -> None:
    for name in checkpoint.shapes:
        dtype, _ = layout[name]
        if dtype != torch.uint8:  # packed weights were written block by block
            writer.add(name, checkpoint.tensors({name: name}, "cpu")[name].to(dtype))


def _stored_dtype(checkpoint: SourceCheckpoint, name: str) -> torch.dtype:
    # a plan has one high-precision type; what is outside keeps fp16, where bf16 would lose bits
    return torch.bfloat16 if is_in_plan(name) else _STORED_AS[checkpoint.dtypes[name]]
