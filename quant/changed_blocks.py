"""Quantizing some blocks of a finished checkpoint again, from changed weights.

Recipe, formats of the Linears and calibration statistics are those of the checkpoint, so a block
whose weights did not change comes out with the same bytes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .block_writing import BlockWork, block_reports, write_blocks
from .checkpoint_layout import Layout, checkpoint_layout
from .checkpoint_writer import CheckpointWriter
from .errors.calibration import StatisticsMissingError
from .flux.config import block_linears
from .progress import Progress
from .quantized_checkpoint import QuantizedCheckpoint, is_in_plan
from .sources.source import FluxSource
from .stack import report_dtype
from .statistics_files import StatisticsFolder

logger = logging.getLogger(__name__)


@torch.inference_mode()
def quantize_changed_blocks(
    source: FluxSource,
    base: QuantizedCheckpoint,
    blocks: Sequence[str],
    destination: Path,
    statistics: Path,
    progress: Progress,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> QuantizedCheckpoint:
    """Quantize blocks into a small file of their own.

    Interrupted at any moment, the blocks that are done stay beside ``destination``, and the same
    call goes on after them.

    Args:
        source: The weights that ``base`` was quantized from, some of them changed; its digest tells
            one change from another.
        base: Header of the checkpoint whose blocks are changed.
        blocks: Their names in the order they run.
        destination: The ``.safetensors`` file to write.
        statistics: Folder that holds the statistics of ``base``.
        progress: Called before each block and at least once per Linear; may raise to cancel.
        device: Where to compute.
        dtype: Type to compute reports in; None takes ``report_dtype``.

    Returns:
        The header of the written file, whose ``base_digest`` is the content digest of ``base``.

    Raises:
        StatisticsMissingError: The statistics of a block are gone.
        NotFiniteError: A weight is not finite.
        DiskFullError: The disk cannot hold the result.
        CheckpointBusyError: Another process is writing the same file.
    """
    started = time.monotonic()
    metadata = base.metadata
    folder = StatisticsFolder(statistics, metadata.source_digest, metadata.calibration_digest)
    for block in blocks:
        if not folder.holds(block):
            raise StatisticsMissingError(base.name, block)
    linears = [f"{block}.{linear}" for block in blocks for linear in block_linears(block)]
    formats = {linear: base.linear_format(linear) for linear in linears}
    dtype = dtype or report_dtype(device, metadata.options.recipe)
    work = BlockWork(source, metadata.options, folder, formats, device, dtype)
    layout = _changed_layout(work, blocks)
    with CheckpointWriter(destination, layout, _job(work, base)) as writer:
        write_blocks(blocks, work, layout, writer, progress)
        reports = block_reports(writer, blocks)
        changed = {
            "source_digest": source.digest(),
            "content_digest": writer.content_digest(),
            "linears": reports[0],
            "blocks": reports[1],
            "base_digest": metadata.content_digest,
        }
        writer.finish(metadata.model_copy(update=changed))
    seconds = time.monotonic() - started
    logger.info("Quantized %d changed blocks of %s in %.1f s", len(blocks), base.name, seconds)
    return QuantizedCheckpoint.read(destination)


def _changed_layout(work: BlockWork, blocks: Sequence[str]) -> Layout:
    prefixes = tuple(f"{block}." for block in blocks)
    whole = checkpoint_layout(work.source, work.formats, work.options)
    return {
        name: entry
        for name, entry in whole.items()
        if name.startswith(prefixes) and is_in_plan(name)
    }


def _job(work: BlockWork, base: QuantizedCheckpoint) -> str:
    return json.dumps({"source": work.source.digest(), "base": base.metadata.content_digest})
