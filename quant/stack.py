"""Carrying calibration samples through the stack of blocks, one block in memory at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .calibration import CalibrationSet, SampleState, embedded_samples
from .durations import block_operations, block_weights, calibrate_work
from .errors.calibration import OTHER_SAMPLES, NotFiniteError
from .flux.blocks import (
    DoubleStreamBlock,
    SingleStreamBlock,
    block_from_config,
    block_modulation,
)
from .flux.config import FluxConfig, block_linears
from .flux.model import Embedders, LastLayer
from .nvfp4 import finite_amax
from .progress import Progress, Record, unrecorded
from .recipe import Recipe
from .sqnr import SQNR
from .statistics import BlockObserver, BlockStatistics, probe_states
from .statistics_files import StatisticsFolder

if TYPE_CHECKING:
    from .sources.source import FluxSource

logger = logging.getLogger(__name__)

Block = DoubleStreamBlock | SingleStreamBlock


def compute_dtype(device: str) -> torch.dtype:
    """Return the type to run blocks in: bf16 where matrix units multiply it, otherwise fp32."""
    if device != "cpu" or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16
    return torch.float32


def report_dtype(device: str, recipe: Recipe) -> torch.dtype:
    """Return the type to measure quantized blocks in: nothing that is written depends on it.

    A CPU that multiplies bf16 without matrix units (AVX512_BF16) does so several times as fast as
    fp32. With every Linear in plain NVFP4, SQNRs differ by hundredths of a dB. What is finer than
    that, bf16 would make look coarser: it rounds tokens to which a block adds little. Calibration
    and training stay in ``compute_dtype``: they go into the result.
    """
    is_plain = recipe.linears == "nvfp4" and not (
        recipe.overrides or recipe.auto or recipe.low_rank or recipe.training
    )
    if is_plain and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return compute_dtype(device)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Name the first of a checkpoint's tensors that holds NaN or infinity.

    Raises:
        NotFiniteError: There is one.
    """
    for name, tensor in tensors.items():
        finite_amax(tensor, f"'{name}'")


def block_with_weights(
    name: str, config: FluxConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Block:
    """Make a block's module over its tensors, which are shared where their type is ``dtype``."""
    with torch.device("meta"):
        block = block_from_config(name, config)
    state = {part: tensor.to(dtype) for part, tensor in tensors.items()}
    block.load_state_dict(state, assign=True)
    return block.requires_grad_(False)


def run_block(block: Block, state: SampleState) -> SampleState:
    """Carry one sample through a block."""
    mods = block_modulation(block, state.vec, state.shared_mods)
    if isinstance(block, DoubleStreamBlock):
        assert state.txt is not None
        img, txt = block(state.img, state.txt, state.cos, state.sin, mods)
        return replace(state, img=img, txt=txt)
    x = state.img if state.txt is None else torch.cat((state.txt, state.img), dim=1)
    return replace(state, img=block(x, state.cos, state.sin, mods), txt=None)


def placed(state: SampleState, block: Block) -> SampleState:
    """Return a state on a block's device and in its type."""
    like = next(block.parameters())
    return replace(
        state,
        img=state.img.to(like),
        txt=None if state.txt is None else state.txt.to(like),
        vec=state.vec.to(like),
        cos=state.cos.to(like.device),
        sin=state.sin.to(like.device),
        shared_mods=None if state.shared_mods is None else state.shared_mods.to(like),
    )


def tokens(state: SampleState) -> Tensor:
    """Return all tokens of a state as one sequence ``[1, T + N, D]``, text first."""
    return state.img if state.txt is None else torch.cat((state.txt, state.img), dim=1)


@torch.inference_mode()
def collect_statistics(
    source: FluxSource,
    calibration: CalibrationSet,
    folder: StatisticsFolder,
    progress: Progress,
    device: str,
    dtype: torch.dtype,
    record: Record = unrecorded,
) -> None:
    """Make the statistics of every block that has none yet.

    Samples go through the blocks in full precision, so what a block sees does not depend on how
    any other is quantized.

    Args:
        source: The model.
        calibration: The samples.
        folder: Where statistics are kept; complete afterwards.
        progress: Called before each block and between samples; may raise to cancel, which keeps
            the blocks that are done.
        device: Where to compute.
        dtype: Type to compute in.
        record: Told how long each block took.

    Raises:
        CalibrationError: The samples do not fit.
        NotFiniteError: A weight or an activation is not finite.
        DiskFullError, FileWriteError: The system refuses to write.
    """
    blocks = source.config.block_names
    if folder.velocity_sqnr_db() is not None and all(map(folder.read, blocks)):
        logger.info("Calibration statistics of %s are in %s", source.name, folder.path)
        return
    waiting = partial(progress, "Waiting for another calibration of this model", 0, len(blocks))
    with folder.only_writer(waiting):
        _collect(source, calibration, folder, progress, device, dtype, record)


def _collect(
    source: FluxSource,
    calibration: CalibrationSet,
    folder: StatisticsFolder,
    progress: Progress,
    device: str,
    dtype: torch.dtype,
    record: Record,
) -> None:
    blocks = source.config.block_names
    count = len(calibration.samples)
    progress(f"Embedding {count} samples", 0, len(blocks))
    states = embed(source, calibration, device, dtype)
    for done, name in enumerate(blocks):
        started = time.monotonic()
        tensors = source.submodule(name, device)
        check_finite({f"{name}.{part}": tensor for part, tensor in tensors.items()})
        block = block_with_weights(name, source.config, tensors, dtype)
        statistics = folder.read(name)
        phase = f"Calibrating {name}" if statistics is None else f"Passing {name}"
        probes = probe_states(states)
        with BlockObserver(name, block, block_linears(name), count) as observer:
            for index, state in enumerate(states):
                progress(phase, done, len(blocks))
                states[index] = run_block(block, state)
        if statistics is None:
            folder.write(name, observer.statistics(probes))
        if not all(torch.isfinite(state.img).all() for state in states):
            raise NotFiniteError(
                f"The output of '{name}'",
                OTHER_SAMPLES,
            )
        counts = [tokens(state).shape[1] for state in states]
        units = block_operations(source.config, name, block_weights(source, name), counts)
        record(calibrate_work(name, device), units, time.monotonic() - started)
    folder.write_velocity_sqnr_db(_velocity_sqnr_db(source, calibration, states))


def block_statistics(folder: StatisticsFolder, block: str) -> BlockStatistics:
    """Read the statistics that ``collect_statistics`` made."""
    statistics = folder.read(block)
    if statistics is None:
        raise FileNotFoundError(f"{folder.path} lost the statistics of {block} while in use")
    return statistics


def embed(
    source: FluxSource, calibration: CalibrationSet, device: str, dtype: torch.dtype
) -> list[SampleState]:
    """Return every sample's state before the first block."""
    embedders = Embedders(source.config)
    tensors = source.tensors(embedders.state_dict(), device)
    check_finite(tensors)
    embedders.load_state_dict(tensors)
    return embedded_samples(calibration, embedders.to(device, dtype), source.config)


def last_layer(source: FluxSource, device: str, dtype: torch.dtype) -> LastLayer:
    """Return the model's final layer."""
    layer = LastLayer(source.config)
    names = {f"final_layer.{part}": part for part in layer.state_dict()}
    tensors = source.tensors(names, device)
    check_finite(tensors)
    layer.load_state_dict({part: tensors[name] for name, part in names.items()})
    return layer.requires_grad_(False).to(device, dtype)


def _velocity_sqnr_db(
    source: FluxSource, calibration: CalibrationSet, states: Sequence[SampleState]
) -> float:
    like = states[0].img
    layer = last_layer(source, str(like.device), like.dtype)
    ratio = SQNR()
    for sample, state in zip(calibration.samples, states, strict=True):
        target = sample.velocity_patches(source.config.patch_size)
        start = sample.conditioning.context.shape[1]
        predicted = layer(state.img[:, start : start + target.shape[1]], state.vec)
        ratio.add(target, predicted.float().cpu())
    return ratio.db
