"""Quantizing and training the blocks of a checkpoint in the order they run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..block_quantizer import QuantizedBlock, measured_block
from ..block_writing import BlockWork, kept_tensors, quantized_block, write_block
from ..calibration import CalibrationSet
from ..checkpoint_layout import Layout
from ..checkpoint_writer import CheckpointWriter
from ..durations import block_operations, block_weights, quantize_work, train_work
from ..emulation import emulated_block
from ..errors.calibration import CalibrationError
from ..flux.config import block_linears
from ..progress import Progress, Record, unrecorded
from ..stack import Block, block_statistics, block_with_weights, embed, placed, run_block
from .block_training import BlockSamples, held_out_samples, train_block
from .states import StateFiles
from .trainable import trainable_block, trained_tensors

MIN_PICTURES = 2
"""One to learn from and one to be judged by."""


def write_trained_blocks(
    blocks: Sequence[str],
    work: BlockWork,
    calibration: CalibrationSet,
    layout: Layout,
    writer: CheckpointWriter,
    progress: Progress,
    record: Record = unrecorded,
) -> None:
    """Quantize, train and write every block, one in memory at a time.

    Blocks that an earlier run finished are read back and only passed: each block learns behind the
    quantized blocks before it.

    Args:
        blocks: All of the model, in the order they run.
        work: What to quantize and how; the recipe says how to train.
        calibration: Samples to learn from.
        layout: Of the file.
        writer: Takes the tensors; each block is a part of its own.
        progress: Called before each block and each step; may raise to cancel.
        record: Told how long the work took.

    Raises:
        CalibrationError: There is only one picture.
    """
    held_out = _held_out(calibration)
    # tensors made in inference mode could not take part in training
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        writer.scratch_folder() as folder,
    ):
        targets, inputs = _embedded(folder, work, calibration)
        for done, block in enumerate(blocks):
            tell = partial(_tell, progress, block, done, len(blocks))
            tensors = work.source.submodule(block, work.device)
            teacher = block_with_weights(block, work.source.config, tensors, work.dtype)
            tell("Passing")
            samples = BlockSamples(inputs, targets, held_out, teacher)
            if block not in writer.finished:
                trained = _trained_block(block, teacher, tensors, work, samples, tell, record)
                kept = kept_tensors(block, tensors, trained, layout)
                write_block(block, kept, trained, work, layout, writer)
            tell("Passing")
            stored = {n: t.to(work.device) for n, t in writer.read_block(block).items()}
            student = emulated_block(teacher, stored)
            for index, state in enumerate(inputs):
                inputs.write(index, run_block(student, placed(state, student)))


def _trained_block(
    name: str,
    teacher: Block,
    tensors: Mapping[str, Tensor],
    work: BlockWork,
    samples: BlockSamples,
    tell: Callable[[str], None],
    record: Record,
) -> QuantizedBlock:
    options, formats = work.options.recipe.training, work.block_formats(name)
    assert options is not None
    count, started = block_weights(work.source, name), time.monotonic()
    quantized = quantized_block(name, teacher, tensors, work, partial(tell, "Quantizing"))
    kind = quantize_work(name, formats.values(), work.options, work.device)
    record(kind, count, time.monotonic() - started)
    started = time.monotonic()
    weights = {linear: tensors[f"{linear}.weight"] for linear in block_linears(name)}
    student = trainable_block(teacher, weights, quantized.tensors)
    report = train_block(student, samples, options, partial(tell, "Training"))
    operations = block_operations(work.source.config, name, count, samples.tokens(options.steps))
    record(train_work(name, work.device), operations, time.monotonic() - started)
    changed = trained_tensors(student) if report.helped else {}
    statistics = block_statistics(work.statistics, name)
    trained = measured_block(name, teacher, quantized.tensors | changed, statistics, formats)
    note = trained.report.model_copy(update={"training": report})
    return QuantizedBlock(trained.tensors, trained.linears, note)


def _embedded(
    folder: Path, work: BlockWork, calibration: CalibrationSet
) -> tuple[StateFiles, StateFiles]:
    states = embed(work.source, calibration, work.device, work.dtype)
    files = []
    for role in ("original", "quantized"):
        (folder / role).mkdir()
        files.append(StateFiles(folder / role, states))
    return files[0], files[1]


def _held_out(calibration: CalibrationSet) -> list[int]:
    count = len(calibration.samples)
    if count < MIN_PICTURES * calibration.timesteps:
        pictures = count // calibration.timesteps
        raise CalibrationError(
            f"training has {pictures} picture to learn from", f"it needs {MIN_PICTURES} or more"
        )
    return held_out_samples(count, calibration.timesteps)


def _tell(progress: Progress, block: str, done: int, total: int, phase: str) -> None:
    progress(f"{phase} {block}", done, total)
