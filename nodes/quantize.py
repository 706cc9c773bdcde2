"""Node: FLUX checkpoint to quantized checkpoint."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..quant.recipe import RECIPES, QuantizeOptions
from . import paths
from .fingerprint import OutputLedger, file_state
from .schema import CATEGORY, Samples, description

RECIPE = io.Combo.Input(
    "recipe",
    options=list(RECIPES),
    default=RECIPES[0],
    tooltip="How FP4 scales are chosen. nvfp4-max takes the largest value seen in calibration.",
)
FP8_ATTENTION = io.Boolean.Input(
    "fp8_attention",
    display_name="fp8 attention",
    default=True,
    tooltip="Run attention in FP8 as well. It is faster on every supported GPU; turn it off to "
    "compare image quality with bf16 attention.",
)


def source_input() -> io.Combo.Input:
    """Return the input for a FLUX checkpoint, with the files that are there now."""
    return io.Combo.Input(
        "checkpoint",
        options=paths.source_checkpoints(),
        tooltip="FLUX.1 checkpoint in models/diffusion_models: bf16, fp16 or fp32 "
        "safetensors in BFL or ComfyUI layout.",
    )


class Quantize(io.ComfyNode):
    """Quantizes a FLUX.1 checkpoint to NVFP4, one block at a time, and writes it to
    models/flux_fp4. Modulation, embedders and the final layer keep their precision. Nothing is done
    when an up-to-date checkpoint of this name exists."""

    ledger = OutputLedger()

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4Quantize",
            display_name="Quantize FLUX to FP4",
            category=CATEGORY,
            description=description(Quantize),
            search_aliases=["fp4", "nvfp4", "quantize", "ptq", "modelopt", "compress flux"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                source_input(),
                Samples.Input(
                    "samples", tooltip="What 'FLUX Calibration Samples' made of your pictures."
                ),
                io.String.Input(
                    "name",
                    default="flux-nvfp4",
                    tooltip="Name of the quantized checkpoint. A checkpoint of the same name is "
                    "replaced.",
                ),
                RECIPE,
                FP8_ATTENTION,
            ],
            outputs=[
                io.Combo.Output(
                    display_name="checkpoint",
                    tooltip="Name of the quantized checkpoint, for 'Export FLUX FP4 to ONNX'.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        # None while the name comes through a link; it is checked when the node runs.
        fault = None if name is None else paths.name_fault(name)
        return True if fault is None else f"{name!r} cannot be used: {fault}"

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None, **_options: Any) -> tuple[Any, int]:
        source = checkpoint and file_state(paths.source_checkpoint(checkpoint))
        return source, cls.ledger.fingerprint(cls.hidden.unique_id)

    @classmethod
    def execute(
        cls, checkpoint: str, samples: Any, name: str, recipe: str, fp8_attention: bool
    ) -> io.NodeOutput:
        from . import reports, stages
        from .progress import NodeProgress

        source = paths.source_checkpoint(checkpoint)
        destination = paths.new_checkpoint(name)
        options = QuantizeOptions(recipe=recipe, fp8_attention=fp8_attention)
        progress = NodeProgress(cls.hidden.unique_id)
        quantized = stages.up_to_date_checkpoint(source, destination, options, samples.digest())
        if quantized is None:
            quantized = stages.quantize(source, destination, samples, options, progress)
        cls.ledger.record(cls.hidden.unique_id, [destination])
        text = reports.quantized_summary(quantized)
        progress.show(text)
        return io.NodeOutput(name, ui=ui.PreviewText(text))
