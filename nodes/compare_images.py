"""Node: metrics of pictures by the original and the quantized model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .failures import told
from .schema import CATEGORY, description, report_with_picture

_METRICS = {
    "psnr": (True, "Peak signal-to-noise ratio of each pair, in dB; higher is closer."),
    "ssim": (True, "Structural similarity of each pair; 1 is equal."),
    "lpips": (False, "Distance of each pair as people see it. Fetches AlexNet, 233 MB."),
    "clip_score": (False, "How well each picture fits its prompt. Fetches CLIP ViT-L/14, 1.7 GB."),
    "clip_iqa": (False, "How good each picture is by itself. Fetches CLIP ViT-L/14, 1.7 GB."),
    "image_reward": (
        False,
        "How people would like each picture of its prompt. Needs the package image-reward in a "
        "Python of its own; the error without it names the commands.",
    ),
    "fid": (False, "Distance of both sets as a whole; needs 2,049 pictures in each."),
    "kid": (False, "Distance of both sets as a whole; needs 100 pictures in each."),
}
"""By name: on at first, and the tooltip."""


class CompareImages(io.ComfyNode):
    """Measures how far pictures of a quantized model are from the original's. Connect two batches
    that were drawn from the same prompts and seeds. With at least two pictures, metrics that judge
    single pictures come with confidence intervals and the number of prompts that would be enough.
    Networks of metrics run on the CPU; for many pictures use the command 'quality'."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4CompareImages",
            display_name="FLUX FP4 Compare Images",
            category=CATEGORY,
            description=description(CompareImages),
            search_aliases=[
                "fp4",
                "psnr",
                "ssim",
                "lpips",
                "clip",
                "imagereward",
                "fid",
                "quality",
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("original", tooltip="Pictures of the original model."),
                io.Image.Input(
                    "quantized",
                    tooltip="Pictures of the quantized model, from the same prompts and seeds, in "
                    "the same order.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="One prompt per line, in the order of the pictures. Only clip_score "
                    "and image_reward need them.",
                ),
                *(
                    io.Boolean.Input(
                        name,
                        default=on,
                        optional=True,
                        advanced=name in ("fid", "kid"),
                        tooltip=tooltip,
                    )
                    for name, (on, tooltip) in _METRICS.items()
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The tables as plain text."),
                io.Image.Output(
                    display_name="grid",
                    tooltip="The pairs with the lowest PSNR, side by side with a heat map of "
                    "their difference.",
                ),
                io.String.Output(
                    display_name="json", tooltip="Every value of every picture, as JSON."
                ),
            ],
        )

    @classmethod
    @told
    def execute(
        cls, original: Any, quantized: Any, prompts: str = "", **chosen: bool
    ) -> io.NodeOutput:
        from ..quant.quality.charts import picture_grid
        from ..quant.quality.evaluation import check_prompts, evaluate, load_metrics
        from ..quant.quality.grids import worst_pairs
        from ..quant.quality.pictures import BatchPictures, check_counts, prompts_in_lines
        from ..quant.quality.report import report_text
        from .progress import NodeProgress

        names = [name for name, (on, _) in _METRICS.items() if chosen.get(name, on)]
        first, second = BatchPictures("original", original), BatchPictures("quantized", quantized)
        check_counts([first, second])
        texts = prompts_in_lines(prompts, len(first)) if prompts.strip() else None
        check_prompts(names, texts)
        metrics = load_metrics(names, "cpu")
        report = evaluate(first, [second], texts, metrics, NodeProgress(cls.hidden.unique_id))
        grid = picture_grid(worst_pairs(report, first, second), (first.name, second.name))
        return report_with_picture(cls, report_text(report), grid, report.model_dump_json(indent=1))
