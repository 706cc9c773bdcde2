"""Writing a distilled student as a quantized checkpoint like the one that it began as."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..block_quantizer import QuantizedBlock, measured_block
from ..block_writing import block_reports
from ..checkpoint_writer import CheckpointWriter, stored_layout
from ..flux.config import block_linears
from ..progress import Progress
from ..quantized_checkpoint import DistillationReport, QuantizedCheckpoint
from ..sources.source import FluxSource
from ..stack import block_statistics, block_with_weights
from ..statistics_files import StatisticsFolder


@dataclass(frozen=True)
class DistilledWork:
    """What writing needs besides the trained tensors.

    Attributes:
        source: The original.
        base: The checkpoint that was trained.
        destination: The ``.safetensors`` file to write.
        statistics: Of the calibration of ``base``.
        device: Where to measure.
        dtype: Type to measure in.
    """

    source: FluxSource
    base: QuantizedCheckpoint
    destination: Path
    statistics: StatisticsFolder
    device: str
    dtype: torch.dtype

    @property
    def measures(self) -> bool:
        """Whether the statistics of every block are there."""
        return all(map(self.statistics.holds, self.base.metadata.block_names))


def write_distilled(
    work: DistilledWork,
    trained: Iterator[dict[str, Tensor]],
    report: DistillationReport,
    progress: Progress,
) -> QuantizedCheckpoint:
    """Write the checkpoint; what training did not touch has the bytes of the one before.

    Args:
        work: See above.
        trained: What training changed of each block, in the order they run, by names relative to
            the block.
        report: For the metadata.
        progress: Called before each block; may raise to cancel.

    Raises:
        DiskFullError, FolderNotWritableError, FileWriteError, CheckpointBusyError: See
            ``CheckpointWriter``.
    """
    base, blocks = work.base, work.base.metadata.block_names
    layout = stored_layout(base.tensors)
    with CheckpointWriter(work.destination, layout, _job(work, report)) as writer:
        for done, (name, changed) in enumerate(zip(blocks, trained, strict=True)):
            progress(f"Writing {name}", done, len(blocks))
            if name in writer.finished:
                continue
            stored = base.block_tensors(name)
            block = _reported(name, stored, changed, work)
            for part, tensor in block.tensors.items():
                writer.add(f"{name}.{part}", tensor)
            writer.finish_part(name, _note(block))
        in_blocks = tuple(f"{name}." for name in blocks)
        for name in base.tensors:
            if not name.startswith(in_blocks):
                writer.add(name, base.load(name))
        linears, reports = block_reports(writer, blocks)
        changes = {
            "content_digest": writer.content_digest(),
            "linears": linears,
            "blocks": reports,
            "distillation": report,
        }
        writer.finish(base.metadata.model_copy(update=changes))
    return QuantizedCheckpoint.read(work.destination)


def _reported(
    name: str, stored: Mapping[str, Tensor], changed: Mapping[str, Tensor], work: DistilledWork
) -> QuantizedBlock:
    """Return a block's tensors with reports: measured, or those from before training."""
    tensors = {**stored, **{part: tensor.cpu() for part, tensor in changed.items()}}
    metadata = work.base.metadata
    before = next(report for report in metadata.blocks if report.name == name)
    linears = tuple(entry for entry in metadata.linears if entry.name.startswith(f"{name}."))
    if not work.measures:
        return QuantizedBlock(tensors, linears, before)
    weights = work.source.submodule(name, work.device)
    original = block_with_weights(name, work.source.config, weights, work.dtype)
    formats = {part: work.base.linear_format(f"{name}.{part}") for part in block_linears(name)}
    quantized = {part: tensor.to(work.device) for part, tensor in tensors.items()}
    statistics = block_statistics(work.statistics, name)
    measured = measured_block(name, original, quantized, statistics, formats)
    note = measured.report.model_copy(update={"training": before.training})
    return QuantizedBlock(tensors, measured.linears, note)


def _note(block: QuantizedBlock) -> dict[str, object]:
    return {
        "linears": [report.model_dump() for report in block.linears],
        "block": block.report.model_dump(),
    }


def _job(work: DistilledWork, report: DistillationReport) -> str:
    # the SQNR is in it: a run on other machines rounds differently, and is not gone on with
    return json.dumps({"base": work.base.metadata.content_digest, **report.model_dump()})
