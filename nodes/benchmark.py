"""Node: how fast models sample, side by side in one run, and how near an engine is to its limit."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import comfy.model_management
from comfy_api.latest import io

from . import paths
from .failures import told
from .schema import CATEGORY, description, report_with_picture

if TYPE_CHECKING:
    from ..quant.roofline.bounds import StepBound
    from ..quant.roofline.work import StepSizes
    from .model_timing import ModelTiming

SEED = 0
"""Times do not depend on the noise."""

STEP = "step"


class Benchmark(io.ComfyNode):
    """Measures how long models take per step and picture, in turns in one run, so that what else
    the machine does falls on all of them: an engine beside ComfyUI's own FLUX in bf16, FP8 or
    NVFP4. Says how near an engine comes to what the GPU could do."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4Benchmark",
            display_name="FLUX FP4 Benchmark",
            category=CATEGORY,
            description=description(Benchmark),
            search_aliases=["fp4", "nvfp4", "speed", "it/s", "seconds per step", "compare speed"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "tested",
                    tooltip="What is measured, for example of 'Load FLUX FP4 Engine'.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="A prompt, with FluxGuidance and references where you use them.",
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty latent of the size of your pictures.",
                ),
                io.Model.Input(
                    "baseline",
                    optional=True,
                    tooltip="Another model to measure beside it, for example of 'Load Diffusion "
                    "Model'.",
                ),
                io.Model.Input(
                    "third",
                    optional=True,
                    tooltip="One more, for example the same checkpoint in FP8.",
                ),
                io.Int.Input(
                    "steps",
                    default=10,
                    min=2,
                    max=100,
                    tooltip="Steps per round and model, with sampler euler: each is one "
                    "prediction.",
                ),
                io.Int.Input(
                    "rounds",
                    default=3,
                    min=2,
                    max=50,
                    tooltip="How often every model samples, one after the other. In the first "
                    "round models are loaded and kernels compiled: its first step counts by "
                    "itself.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The table as plain text."),
                io.Image.Output(display_name="chart", tooltip="Time of a step by model."),
                io.String.Output(display_name="json", tooltip="Every figure, to keep or compare."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs: Any) -> float:
        # measured anew whenever it is queued
        return float("nan")

    @classmethod
    @told
    def execute(
        cls,
        tested: Any,
        positive: list[Any],
        latent: dict[str, Any],
        steps: int,
        rounds: int,
        baseline: Any = None,
        third: Any = None,
    ) -> io.NodeOutput:
        from .progress import NodeProgress

        models = {"tested": tested, "baseline": baseline, "third": third}
        chosen = {name: model for name, model in models.items() if model is not None}
        progress = NodeProgress(cls.hidden.unique_id)
        timings = _measured(chosen, positive, latent, steps, rounds, progress)
        sizes = _sizes(tested, positive, latent)
        bound, missing = _bound(tested, sizes, steps)
        text = _text(timings, bound, missing, sizes, steps, rounds, tested)
        figures = {name: asdict(timing) for name, timing in timings.items()}
        details = {"steps": steps, "rounds": rounds, **asdict(sizes)}
        details["bound_seconds"] = bound.seconds if bound else None
        return report_with_picture(
            cls, text, _chart(timings, bound), json.dumps({**details, "models": figures})
        )


def _measured(
    models: dict[str, Any],
    positive: list[Any],
    latent: dict[str, Any],
    steps: int,
    rounds: int,
    progress: Any,
) -> dict[str, ModelTiming]:
    from .model_timing import ModelTiming, backend_of, described, timed_round
    from .trajectories import Sampling

    sampling = Sampling(positive, latent, SEED, steps, "euler", "simple")
    timings = {
        name: ModelTiming(described(model), backend_of(model)) for name, model in models.items()
    }
    total, done = rounds * steps * len(models), 0
    for number in range(rounds):
        for name, model in models.items():
            phase = f"Round {number + 1} of {rounds}: {name}"

            def step_done(phase: str = phase) -> None:
                nonlocal done
                done += 1
                progress(phase, done, total)

            progress(phase, done, total)
            timed_round(model, sampling, timings[name], number == 0, step_done)
    return timings


def _sizes(model: Any, positive: list[Any], latent: dict[str, Any]) -> StepSizes:
    """Return what a step works on, reference latents included."""
    from ..quant.roofline.work import StepSizes

    patch = model.model.model_config.unet_config.get("patch_size", 2) ** 2
    text, options = positive[0]
    samples, ratio = latent["samples"], model.model.latent_format.spacial_downscale_ratio
    # ComfyUI fits an empty latent of another model's scale
    scale = (latent.get("downscale_ratio_spacial") or ratio) / ratio
    own = int(samples.shape[-2] * scale) * int(samples.shape[-1] * scale) // patch
    references = options.get("reference_latents", ())
    others = sum(x.shape[-2] * x.shape[-1] // patch for x in references)
    return StepSizes(samples.shape[0], own + others, text.shape[1])


def _bound(model: Any, sizes: StepSizes, steps: int) -> tuple[StepBound | None, str]:
    """Return the bound of an engine on this GPU, or why there is none."""
    from ..quant.errors.speed import FormatNotInGpuError, UnknownGpuError
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from ..quant.roofline.bounds import step_bound
    from ..quant.roofline.subjects import checkpoint_subject
    from .engine_patcher import EnginePatcher
    from .errors import NoGpuError
    from .gpus import THIS, chosen_peaks

    if not isinstance(model, EnginePatcher):
        return None, "the tested model is no engine"
    checkpoint = QuantizedCheckpoint.read(paths.engine_checkpoint(model.model.engine.folder))
    subject = checkpoint_subject(checkpoint.name, checkpoint.metadata)
    subject = subject.running(modulation_on_gpu=model.model.modulation is None)
    try:
        gpu = chosen_peaks(THIS)
        return step_bound(subject.config, sizes, subject.options, gpu, steps), ""
    except (NoGpuError, UnknownGpuError, FormatNotInGpuError) as error:
        return None, str(error)


def _text(
    timings: dict[str, ModelTiming],
    bound: StepBound | None,
    missing: str,
    sizes: StepSizes,
    steps: int,
    rounds: int,
    model: Any,
) -> str:
    from ..quant.roofline.report import bound_text
    from ..trt_runtime.backend import REFERENCE

    device = comfy.model_management.get_torch_device_name(model.load_device)
    lines = [
        f"{device}: {sizes.img_tokens} image and {sizes.txt_tokens} text tokens, batch "
        f"{sizes.batch}; {rounds} rounds in turns",
        *(f"{name}: {timing.name}" for name, timing in timings.items()),
        "",
        _table(timings, steps),
        "x: how many steps the tested model makes in one of theirs.",
        *(
            f"{name} runs on the slow CPU reference: its times say nothing about FP4."
            for name, timing in timings.items()
            if timing.backend == REFERENCE
        ),
        "",
    ]
    if bound is None:
        return "\n".join([*lines, f"No limit is shown: {missing}"])
    tested = timings["tested"]
    part = bound.seconds / tested.step.median
    reached = f"The tested model reaches {part:.0%} of the possible speed."
    return "\n".join([*lines, reached, bound_text(tested.name, bound, sizes, steps)])


def _table(timings: dict[str, ModelTiming], steps: int) -> str:
    from ..quant.quality.tables import text_table
    from ..quant.roofline.report import milliseconds

    header = ("model", "first step", "step", "half of all", f"{steps} steps", "x")
    rows = [
        (
            name,
            f"{timing.first:.2f} s",
            milliseconds(timing.step.median),
            f"{1000 * timing.step.low:.1f} to {milliseconds(timing.step.high)}",
            f"{timing.picture:.2f} s",
            f"{timing.step.median / timings['tested'].step.median:.2f}",
        )
        for name, timing in timings.items()
    ]
    return text_table(header, rows)


def _chart(timings: dict[str, ModelTiming], bound: StepBound | None) -> Any:
    from ..quant.roofline.timing_chart import TimedBar, timing_chart

    rows = {name: [TimedBar(STEP, **asdict(timing.step))] for name, timing in timings.items()}
    least = {"tested": bound.seconds} if bound else {}
    return timing_chart(timings["tested"].name, rows, least)
