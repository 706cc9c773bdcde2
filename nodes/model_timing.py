"""How long models take to predict, while ComfyUI samples with them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..trt_runtime.benchmark import Spread
from ..trt_runtime.stopwatch import stopwatch_for
from .engine_patcher import EnginePatcher
from .trajectories import Sampling

StepDone = Callable[[], None]


@dataclass
class ModelTiming:
    """What was measured of one model.

    Attributes:
        name: As the report calls it.
        backend: Of an engine; empty for other models.
        first: Seconds from queueing to the first prediction's end: loading, and kernels that are
            compiled then.
        steps: Seconds of each prediction after the first round's first one.
        pictures: Seconds of each round: all steps, with what samplers do between them.
    """

    name: str
    backend: str
    first: float = 0.0
    steps: list[float] = field(default_factory=list)
    pictures: list[float] = field(default_factory=list)

    @property
    def step(self) -> Spread:
        """Of all predictions that count."""
        return Spread.of(self.steps)

    @property
    def picture(self) -> float:
        """The middle one of all rounds but the first, in which the model is loaded."""
        return Spread.of(self.pictures[1:]).median


def timed_round(
    model: ModelPatcher, sampling: Sampling, timing: ModelTiming, first: bool, step_done: StepDone
) -> None:
    """Sample once and add to what was measured.

    Args:
        model: What predicts.
        sampling: Of one picture or batch.
        timing: Of this model.
        first: Whether it is the model's first round.
        step_done: Called after each step; may raise to cancel.
    """
    watch = stopwatch_for(model.load_device)
    marks: list[tuple[Any, Any]] = []

    def between(executor: Any, *args: Any, **options: Any) -> Any:
        before = watch.mark()
        predicted = executor(*args, **options)
        marks.append((before, watch.mark()))
        if first and len(marks) == 1:
            watch.between(marks[0])
            timing.first = time.perf_counter() - started
        return predicted

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "flux_fp4_benchmark", between)
    sampler = comfy.samplers.sampler_object(sampling.sampler_name)
    started = time.perf_counter()
    sampling.sample(watched, sampler, step_done)
    seconds = time.perf_counter() - started
    found = [watch.between(pair)[0] for pair in marks]
    timing.steps += found[1:] if first else found
    timing.pictures.append(seconds)


def backend_of(model: ModelPatcher) -> str:
    """Return what runs an engine's blocks; nothing for other models."""
    return model.model.engine.backend_name if isinstance(model, EnginePatcher) else ""


def described(model: ModelPatcher) -> str:
    """Say what a MODEL is: an engine's name, or the model's kind, type and size."""
    size = f"{model.model_size() / 1e6:,.0f} MB"
    if isinstance(model, EnginePatcher):
        folder = model.model.engine.folder
        return f"{folder.parent.name}/{folder.name} on {backend_of(model)}, {size}"
    config = model.model.model_config
    dtype = str(model.model.get_dtype()).removeprefix("torch.")
    # checkpoints in one of ComfyUI's quantized layouts
    quantized = ", quantized by ComfyUI" if getattr(config, "quant_config", None) else ""
    return f"{type(model.model).__name__}, {dtype}{quantized}, {size}"
