"""How long the stages will take here: from earlier runs, else from a trial with a small part."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..quant.durations import (
    EXPORT,
    FINISH,
    block_operations,
    block_weights,
    bytes_outside,
    calibrate_work,
    linears_formats,
    measure_work,
    quantize_work,
    train_work,
)
from ..quant.errors import QuantError
from ..quant.trial import trial_run
from ..trt_runtime.builder import build_engine
from ..trt_runtime.durations import (
    START,
    Estimate,
    build_work,
    estimate,
    estimate_plan,
    total,
)
from ..trt_runtime.errors import EngineError
from ..trt_runtime.resources import automatic_workers
from ..trt_runtime.run_history import Run, RunHistory

if TYPE_CHECKING:
    from ..quant.needs import Needs
    from ..quant.progress import Progress
    from ..quant.recipe import QuantizeOptions
    from ..quant.sources.source import FluxSource
    from ..trt_runtime.spec import BuildSpec

TRIAL_SECONDS = 30.0
"""A trial is given up after this; the report says so."""

SAMPLES, TOKENS = 8, 4096 + 512
"""What calibration is estimated for: one picture of a megapixel at the default noise levels."""

VARIANTS = 4
"""Graphs of a block: with and without LoRA and mask."""

Runs = Callable[[str], list[Run]]


@dataclass(frozen=True)
class Work:
    """What is going to be done.

    Attributes:
        source: The checkpoint.
        options: How it is quantized.
        needs: Their sizes.
        spec: What is built.
        device: Where to quantize.
    """

    source: FluxSource
    options: QuantizeOptions
    needs: Needs
    spec: BuildSpec
    device: str


def stage_lines(work: Work, history: RunHistory, progress: Progress) -> list[str]:
    """Say how long each stage will take and all together.

    Args:
        work: What is going to be done.
        history: Earlier runs on this machine.
        progress: Called during a trial; may raise to cancel.
    """
    estimates, origin, fault = _estimates(work, history.runs), "earlier runs on this machine", ""
    if None in estimates.values():
        tried, fault = _trial(work, progress)
        estimates = _estimates(work, lambda kind: history.runs(kind) or tried.get(kind, []))
        origin = "earlier runs on this machine, and a trial with a small part of this checkpoint"
    lines = [f"{stage}: {found or 'not known'}" for stage, found in estimates.items()]
    known = [found for found in estimates.values() if found is not None]
    if len(known) < len(estimates):
        return [*lines, f"A trial of what never ran on this machine did not finish: {fault}"]
    return [*lines, f"All stages: {total(known)}; estimated from {origin}"]


def _estimates(work: Work, runs: Runs) -> dict[str, Estimate | None]:
    name = f"Quantizing with {work.options.recipe.name}"
    calibrating = f"Calibrating with {SAMPLES} samples of 1 megapixel, once for all recipes"
    workers = automatic_workers(work.needs.largest_plan)
    return {
        calibrating: _sum(_calibrations(work, runs)),
        name: _sum(_quantizations(work, runs)),
        "Exporting ONNX": _sum([estimate(runs(EXPORT), VARIANTS)] * len(_blocks(work))),
        f"Building with {workers} processes": _sum(_builds(work, runs, workers)),
    }


def _blocks(work: Work) -> tuple[str, ...]:
    return work.source.config.block_names


def _calibrations(work: Work, runs: Runs) -> Iterable[Estimate | None]:
    for block in _blocks(work):
        weights = block_weights(work.source, block)
        units = block_operations(work.source.config, block, weights, [TOKENS] * SAMPLES)
        yield estimate(runs(calibrate_work(block, work.device)), units)


def _quantizations(work: Work, runs: Runs) -> Iterable[Estimate | None]:
    source, options = work.source, work.options
    for block in _blocks(work):
        weights = block_weights(source, block)
        if options.recipe.auto is not None:
            yield estimate(runs(measure_work(block, work.device)), weights)
        kind = quantize_work(block, linears_formats(block, options), options, work.device)
        yield estimate(runs(kind), weights)
        if options.recipe.training is not None:
            # one sample of a megapixel is enough for a step
            seen = [TOKENS] * options.recipe.training.steps
            units = block_operations(source.config, block, weights, seen)
            yield estimate(runs(train_work(block, work.device)), units)
    yield estimate(runs(FINISH), bytes_outside(source))


def _builds(work: Work, runs: Runs, workers: int) -> Iterable[Estimate | None]:
    yield estimate(runs(START), 1)
    for block, size in work.needs.block_plans.items():
        formats = linears_formats(block, work.options)
        kind = build_work(
            block, "nvfp4" in formats, "fp8" in formats, work.options.fp8_attention, work.spec
        )
        found = estimate_plan(runs(kind), block, size)
        yield None if found is None else found.times(1 / workers)


def _sum(estimates: Iterable[Estimate | None]) -> Estimate | None:
    known = []
    for found in estimates:
        if found is None:
            return None
        known.append(found)
    return total(known)


class _TrialOverError(Exception):
    """The trial takes too long."""


def _trial(work: Work, progress: Progress) -> tuple[Mapping[str, list[Run]], str]:
    """Run all stages on a small part; return what they took, and why it is not all of them."""
    found: dict[str, list[Run]] = {}
    started = time.monotonic()

    def record(kind: str, units: float, seconds: float) -> None:
        found.setdefault(kind, []).append(Run(units, seconds))

    def limited(phase: str, done: int, count: int) -> None:
        progress(f"Trying out: {phase}", done, count)
        if time.monotonic() - started > TRIAL_SECONDS:
            raise _TrialOverError

    with tempfile.TemporaryDirectory(prefix="flux_fp4_trial_") as folder:
        try:
            path = trial_run(work.source, work.options, Path(folder), limited, work.device, record)
            build_engine(path.parent, work.spec, limited, 1, record)
        except _TrialOverError:
            fault = (
                f"it took more than {TRIAL_SECONDS:.0f} s. Try again when the machine is less busy."
            )
            return found, fault
        except (QuantError, EngineError) as error:
            return found, str(error)
    return found, ""
