"""Quantizing a block of a source and writing it, for a whole checkpoint and for changed blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from .background import Background
from .block_quantizer import QuantizedBlock, quantize_block
from .checkpoint_layout import Layout, is_stored_quantized
from .checkpoint_writer import CheckpointWriter
from .durations import block_weights, quantize_work
from .flux.config import block_linears
from .modulation import stored_modulation
from .progress import Progress, Record, unrecorded
from .quantized_checkpoint import BlockReport, LinearReport
from .recipe import Format, QuantizeOptions
from .sources.source import FluxSource
from .stack import Block, block_statistics, block_with_weights, check_finite
from .statistics_files import StatisticsFolder


@dataclass(frozen=True)
class BlockWork:
    """What every step of one quantization needs.

    Attributes:
        source: The weights.
        options: The recipe.
        statistics: Of every block that is quantized.
        formats: By full name of the Linear.
        device: Where to compute.
        dtype: Type to compute reports in; what is written does not depend on it.
    """

    source: FluxSource
    options: QuantizeOptions
    statistics: StatisticsFolder
    formats: Mapping[str, Format]
    device: str
    dtype: torch.dtype

    def block_formats(self, block: str) -> dict[str, Format]:
        """Return the formats of a block's Linears, by names relative to it."""
        return {linear: self.formats[f"{block}.{linear}"] for linear in block_linears(block)}


def write_blocks(
    blocks: Sequence[str],
    work: BlockWork,
    layout: Layout,
    writer: CheckpointWriter,
    progress: Progress,
    record: Record = unrecorded,
) -> None:
    """Quantize blocks that the writer has not finished yet, one in memory at a time.

    While one is computed, what the one before became is written and the one after is read into the
    system's file cache.

    Args:
        blocks: For example ``double_blocks.0``.
        work: What to quantize and how.
        layout: Of the file. Tensors that it does not have are left out, such as the modulation of
            changed blocks.
        writer: Takes the tensors; each block is a part of its own.
        progress: Called before each block and at least once per Linear; may raise to cancel.
        record: Told how long each block took.
    """
    left = [name for name in blocks if name not in writer.finished]
    following = dict(pairwise(left))
    with Background("Writing blocks") as writing, Background("Reading ahead") as reading:
        for done, name in enumerate(blocks):
            if name not in left:
                progress(f"Keeping {name}, finished earlier", done, len(blocks))
                continue
            heartbeat = partial(progress, f"Quantizing {name}", done, len(blocks))
            heartbeat()
            started = time.monotonic()
            reading.wait()
            tensors = work.source.submodule(name, work.device)
            if name in following:
                reading.submit(
                    partial(work.source.read_ahead, following[name], reading.stopping.is_set)
                )
            writing.submit(_block_to_write(name, tensors, work, layout, writer, heartbeat))
            kind = quantize_work(name, work.block_formats(name).values(), work.options, work.device)
            record(kind, block_weights(work.source, name), time.monotonic() - started)


def _block_to_write(
    name: str,
    tensors: Mapping[str, Tensor],
    work: BlockWork,
    layout: Layout,
    writer: CheckpointWriter,
    heartbeat: Callable[[], None],
) -> Callable[[], None]:
    """Quantize a block; return what writes it, and keeps nothing else of it in memory."""
    block = block_with_weights(name, work.source.config, tensors, work.dtype)
    quantized = quantized_block(name, block, tensors, work, heartbeat)
    kept = kept_tensors(name, tensors, quantized, layout)
    return partial(write_block, name, kept, quantized, work, layout, writer)


def quantized_block(
    name: str,
    block: Block,
    tensors: Mapping[str, Tensor],
    work: BlockWork,
    heartbeat: Callable[[], None],
) -> QuantizedBlock:
    """Quantize one block.

    Args:
        name: For example ``double_blocks.0``.
        block: Its module in the type to compute in.
        tensors: Of the block, as the source stores them.
        work: How to quantize.
        heartbeat: Called at least once per Linear; may raise to cancel.
    """
    linears = block_linears(name)
    return quantize_block(
        name,
        block,
        {linear: tensors[f"{linear}.weight"] for linear in linears},
        {linear: work.source.packed(f"{name}.{linear}", work.device) for linear in linears},
        block_statistics(work.statistics, name),
        work.options,
        work.block_formats(name),
        work.source.config.head_dim,
        heartbeat,
    )


def kept_tensors(
    name: str, tensors: Mapping[str, Tensor], quantized: QuantizedBlock, layout: Layout
) -> dict[str, Tensor]:
    """Return the tensors of a block that no plan quantizes, by their full names."""
    written = {*quantized.tensors, *(f"{linear}.weight" for linear in block_linears(name))}
    kept = {f"{name}.{part}": value for part, value in tensors.items() if part not in written}
    return {full: value for full, value in kept.items() if full in layout}


def write_block(
    name: str,
    kept: Mapping[str, Tensor],
    quantized: QuantizedBlock,
    work: BlockWork,
    layout: Layout,
    writer: CheckpointWriter,
) -> None:
    """Write a block's quantized tensors and its ``kept_tensors``, as one part."""
    for part, tensor in quantized.tensors.items():
        writer.add(f"{name}.{part}", tensor)
    write_kept(kept, work, layout, writer)
    note = {
        "linears": [report.model_dump() for report in quantized.linears],
        "block": quantized.report.model_dump(),
    }
    writer.finish_part(name, note)


def write_kept(
    tensors: Mapping[str, Tensor], work: BlockWork, layout: Layout, writer: CheckpointWriter
) -> None:
    """Add tensors that no plan quantizes, by their full names."""
    check_finite(tensors)
    for name, tensor in tensors.items():
        if is_stored_quantized(name, work.options):
            for part, stored in stored_modulation(name, tensor, work.options.modulation).items():
                writer.add(part, stored)
        else:
            writer.add(name, tensor.to(layout[name][0]))


def block_reports(
    writer: CheckpointWriter, blocks: Iterable[str]
) -> tuple[tuple[LinearReport, ...], tuple[BlockReport, ...]]:
    """Return the reports on blocks that the writer has finished."""
    notes = [writer.finished[name] for name in blocks]
    linears = tuple(LinearReport(**report) for note in notes for report in note["linears"])
    return linears, tuple(BlockReport(**note["block"]) for note in notes)
