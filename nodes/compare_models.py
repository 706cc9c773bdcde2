"""Node: what quantization costs along a sampling trajectory."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from .failures import told
from .schema import CATEGORY, description, report_with_picture

PASSES = ("Sampling the reference", "The tested model at the same latents", "Sampling it itself")


class CompareModels(io.ComfyNode):
    """Compares a quantized MODEL with the original along a sampling trajectory: how far its
    velocity is off at each step when both see the same latents, and how far apart the latents are
    when each goes its own way from the same noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4CompareModels",
            display_name="FLUX FP4 Compare Models",
            category=CATEGORY,
            description=description(CompareModels),
            search_aliases=["fp4", "nvfp4", "sqnr", "quality", "quantization error", "velocity"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "reference",
                    tooltip="The original, for example of 'Load Diffusion Model'.",
                ),
                io.Model.Input(
                    "tested",
                    tooltip="The quantized one, for example of 'Load FLUX FP4 Engine'.",
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt, with FluxGuidance where you use it. There is no "
                    "negative prompt: models are sampled at CFG 1.",
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="An empty latent of the size of your pictures. A batch is compared "
                    "as a whole.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="Seed of the noise that both models start from.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="Sampling steps. The reference is evaluated once a step, the tested "
                    "model twice.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    tooltip="Sampler, as in KSampler. Samplers of higher order evaluate the models "
                    "several times a step; adaptive ones cannot be compared.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="simple",
                    tooltip="Noise levels of the steps, as in KSampler.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The table as plain text."),
                io.Image.Output(display_name="chart", tooltip="Errors by evaluation."),
                io.Latent.Output(
                    display_name="reference latent", tooltip="What the reference draws."
                ),
                io.Latent.Output(
                    display_name="tested latent", tooltip="What the tested model draws."
                ),
            ],
        )

    @classmethod
    @told
    def execute(
        cls,
        reference: Any,
        tested: Any,
        positive: list[Any],
        latent: dict[str, Any],
        seed: int,
        steps: int,
        sampler_name: str,
        scheduler: str,
    ) -> io.NodeOutput:
        from ..quant.quality.charts import trajectory_chart
        from ..quant.quality.trajectory import trajectory_report, trajectory_text
        from .progress import NodeProgress
        from .trajectories import Sampling

        sampling = Sampling(positive, latent, seed, steps, sampler_name, scheduler)
        steps_of = _PassProgress(NodeProgress(cls.hidden.unique_id), steps)
        reference_latent, points = sampling.recorded(reference, steps_of.next_pass())
        steps_of.total = len(points)
        denoised = sampling.predictions_at(tested, points, steps_of.next_pass())
        steps_of.total = steps
        tested_latent, own = sampling.recorded(tested, steps_of.next_pass())
        sampling.check_equal_evaluations(len(points), len(own))
        report = trajectory_report(
            points, denoised, [x for x, _, _ in own], reference_latent, tested_latent
        )
        text = trajectory_text(report)
        latents = [_latent(latent, samples) for samples in (reference_latent, tested_latent)]
        return report_with_picture(cls, text, trajectory_chart(report), *latents)


class _PassProgress:
    """Progress of passes over the schedule, each shown from its first step to its last."""

    def __init__(self, progress: Any, total: int) -> None:
        self._progress, self.total, self._passes = progress, total, iter(PASSES)

    def next_pass(self) -> Any:
        phase, done = next(self._passes), 0

        def step_done() -> None:
            nonlocal done
            done += 1
            self._progress(phase, done, self.total)

        self._progress(phase, 0, self.total)
        return step_done


def _latent(latent: dict[str, Any], samples: Any) -> dict[str, Any]:
    # The ratios are of an empty latent, whose channels ComfyUI fits to the model.
    kept = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    return {**kept, "samples": samples}
