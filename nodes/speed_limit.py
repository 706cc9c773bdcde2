"""Node: the least time and memory of a step on a GPU, before anything is quantized or bought."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..quant.flux.config import PATCH_PIXELS
from ..quant.roofline.published import PUBLISHED
from ..trt_runtime.spec import MAX_LORA_RANK
from . import paths
from .failures import told
from .fingerprint import file_state
from .gpus import chosen_peaks, gpu_input
from .load import MAIN_MEMORY, MODULATION
from .recipe_inputs import FP8_ATTENTION, options_from, recipe_input, recipe_state
from .schema import CATEGORY, description, report_with_picture

if TYPE_CHECKING:
    from typing import Any

    from ..quant.roofline.subjects import Subject

NO_CHECKPOINT = "none"


class SpeedLimit(io.ComfyNode):
    """Says how fast a FLUX engine can be at best on a GPU and what it needs of its memory: the
    least time of each part of a step, what bounds it, and which choices would save how much.
    Nothing is run or loaded; it is reckoned from sizes and the GPU's data sheet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4SpeedLimit",
            display_name="FLUX FP4 Speed Limit",
            category=CATEGORY,
            description=description(SpeedLimit),
            search_aliases=["fp4", "nvfp4", "roofline", "bottleneck", "benchmark", "vram"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(PUBLISHED),
                    default="flux1-dev",
                    tooltip="Published model whose sizes count. Finetunes, Kontext and Krea have "
                    "those of flux1-dev, Canny and Depth of flux1-control.",
                ),
                recipe_input(),
                FP8_ATTENTION,
                gpu_input(),
                _pixels("width"),
                _pixels("height"),
                io.Int.Input(
                    "batch",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Pictures per step.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=1000,
                    tooltip="Steps of a picture.",
                ),
                io.Int.Input(
                    "lora_rank",
                    display_name="LoRA rank",
                    default=0,
                    min=0,
                    max=MAX_LORA_RANK,
                    optional=True,
                    advanced=True,
                    tooltip="Rank of all LoRAs at run time together. 0 is none, or baked ones.",
                ),
                io.Int.Input(
                    "text_tokens",
                    display_name="text tokens",
                    default=512,
                    min=1,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Tokens of the prompt: 512 for most workflows, 256 for schnell.",
                ),
                MODULATION,
                io.Combo.Input(
                    "checkpoint",
                    options=[NO_CHECKPOINT, *paths.quantized_checkpoints()],
                    default=NO_CHECKPOINT,
                    optional=True,
                    advanced=True,
                    tooltip="A quantized checkpoint instead of model, recipe and attention: what "
                    "recipe auto has chosen is known then.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The table as plain text."),
                io.Image.Output(display_name="chart", tooltip="The least time of each part."),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, recipe: str | None, checkpoint: str | None = NO_CHECKPOINT, **_options: Any
    ) -> Any:
        if checkpoint in (None, NO_CHECKPOINT):
            return recipe_state(recipe)
        return file_state(paths.quantized_checkpoint(checkpoint))

    @classmethod
    @told
    def execute(
        cls,
        model: str,
        recipe: str,
        fp8_attention: bool,
        gpu: str,
        width: int,
        height: int,
        batch: int,
        steps: int,
        lora_rank: int = 0,
        text_tokens: int = 512,
        modulation_memory: str = MAIN_MEMORY,
        checkpoint: str = NO_CHECKPOINT,
    ) -> io.NodeOutput:
        from ..quant.roofline.bounds import step_bound
        from ..quant.roofline.chart import bound_chart
        from ..quant.roofline.report import bound_text
        from ..quant.roofline.work import StepSizes

        subject = _subject(model, recipe, fp8_attention, checkpoint)
        subject = subject.running(lora_rank, modulation_memory != MAIN_MEMORY)
        sizes = StepSizes(batch, width * height // PATCH_PIXELS**2, text_tokens)
        bound = step_bound(subject.config, sizes, subject.options, chosen_peaks(gpu), steps)
        text = bound_text(subject.name, bound, sizes, steps)
        return report_with_picture(cls, text, bound_chart(subject.name, bound))


def _pixels(side: str) -> io.Int.Input:
    return io.Int.Input(
        side,
        default=1024,
        min=PATCH_PIXELS,
        max=8192,
        step=PATCH_PIXELS,
        tooltip=f"{side.capitalize()} of the picture in pixels.",
    )


def _subject(model: str, recipe: str, fp8_attention: bool, checkpoint: str) -> Subject:
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from ..quant.roofline.subjects import checkpoint_subject, published_subject

    if checkpoint == NO_CHECKPOINT:
        return published_subject(model, options_from(recipe, fp8_attention))
    metadata = QuantizedCheckpoint.read(paths.quantized_checkpoint(checkpoint)).metadata
    return checkpoint_subject(checkpoint, metadata)
