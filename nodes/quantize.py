"""Nodes: FLUX checkpoint or MODEL to quantized checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from . import paths
from .failures import told
from .fingerprint import FileState, OutputLedger, file_state
from .recipe_inputs import ADVANCED, FP8_ATTENTION, options_from, recipe_input, recipe_state
from .schema import CATEGORY, Samples, description

if TYPE_CHECKING:
    from ..quant.recipe import QuantizeOptions
    from ..quant.sources.source import FluxSource

SAMPLES = Samples.Input("samples", tooltip="What 'FLUX Calibration Samples' made of your pictures.")
NAME = io.String.Input(
    "name",
    default="flux-nvfp4",
    tooltip="Name of the quantized checkpoint. A checkpoint of the same name is replaced.",
)
CHECKPOINT_OUTPUT = io.Combo.Output(
    display_name="checkpoint",
    tooltip="Name of the quantized checkpoint, for 'Export FLUX FP4 to ONNX'.",
)


def source_input() -> io.Combo.Input:
    """Return the input for a FLUX checkpoint, with the files that are there now."""
    return io.Combo.Input(
        "checkpoint",
        options=paths.source_checkpoints(),
        tooltip="FLUX checkpoint in models/diffusion_models: safetensors in BFL, ComfyUI or "
        "diffusers layout, in bf16, fp16, fp32, FP8 or NVFP4.",
    )


def source_state(checkpoint: str | None) -> list[FileState]:
    """Return the state of every file of a checkpoint; nothing while it comes through a link."""
    return [file_state(file) for file in paths.source_files(checkpoint)] if checkpoint else []


class Quantize(io.ComfyNode):
    """Quantizes a FLUX checkpoint, one block at a time, and writes it to models/flux_fp4. Embedders
    and the final layer keep their precision. Cancel at any time: the next run goes on after the
    last finished block. Nothing is done when an up-to-date checkpoint of this name exists."""

    ledger = OutputLedger()

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4Quantize",
            display_name="Quantize FLUX to FP4",
            category=CATEGORY,
            description=description(Quantize),
            search_aliases=["fp4", "nvfp4", "svdquant", "quantize", "ptq", "modelopt", "fp8"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[source_input(), SAMPLES, NAME, recipe_input(), FP8_ATTENTION, *ADVANCED],
            outputs=[CHECKPOINT_OUTPUT],
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        return paths.name_verdict(name, "Quantize FLUX to FP4")

    @classmethod
    def fingerprint_inputs(
        cls, checkpoint: str | None, recipe: str | None, **_options: Any
    ) -> tuple[Any, ...]:
        ledger = cls.ledger.fingerprint(cls.hidden.unique_id)
        return source_state(checkpoint), recipe_state(recipe), ledger

    @classmethod
    @told
    def execute(
        cls,
        checkpoint: str,
        samples: Any,
        name: str,
        recipe: str,
        fp8_attention: bool,
        **advanced: Any,
    ) -> io.NodeOutput:
        from ..quant.sources.source import open_source

        source = open_source(paths.source_checkpoint(checkpoint))
        options = options_from(recipe, fp8_attention, **advanced)
        return _quantized(cls, source, samples, name, options)


class QuantizeModel(io.ComfyNode):
    """Quantizes a MODEL as it would be sampled: a FLUX with LoRAs merged into it becomes one
    quantized checkpoint that needs them no more. Otherwise like 'Quantize FLUX to FP4'."""

    ledger = OutputLedger()

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4QuantizeModel",
            display_name="Quantize FLUX MODEL to FP4",
            category=CATEGORY,
            description=description(QuantizeModel),
            search_aliases=["fp4", "nvfp4", "quantize", "merge lora", "bake lora", "model"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="FLUX from 'Load Diffusion Model' or a LoRA loader. Not an engine.",
                ),
                SAMPLES,
                NAME,
                recipe_input(),
                FP8_ATTENTION,
                *ADVANCED,
            ],
            outputs=[CHECKPOINT_OUTPUT],
        )

    @classmethod
    def validate_inputs(cls, name: str) -> bool | str:
        return paths.name_verdict(name, "Quantize FLUX MODEL to FP4")

    @classmethod
    def fingerprint_inputs(cls, recipe: str | None, **_inputs: Any) -> tuple[Any, ...]:
        return recipe_state(recipe), cls.ledger.fingerprint(cls.hidden.unique_id)

    @classmethod
    @told
    def execute(
        cls,
        model: Any,
        samples: Any,
        name: str,
        recipe: str,
        fp8_attention: bool,
        **advanced: Any,
    ) -> io.NodeOutput:
        from .model_source import ModelSource

        options = options_from(recipe, fp8_attention, **advanced)
        return _quantized(cls, ModelSource(model), samples, name, options)


def _quantized(
    node: type[Quantize] | type[QuantizeModel],
    source: FluxSource,
    samples: Any,
    name: str,
    options: QuantizeOptions,
) -> io.NodeOutput:
    from ..quant.quantized_checkpoint import up_to_date_checkpoint
    from . import preflight, reports, stages
    from .progress import NodeProgress

    destination = paths.new_checkpoint(name)
    progress = NodeProgress(node.hidden.unique_id)
    quantized = up_to_date_checkpoint(source, destination, options, samples.digest())
    if quantized is None:
        preflight.require(source, options, None, destination.parent)
        quantized = stages.quantize(source, destination, samples, options, progress)
    node.ledger.record(node.hidden.unique_id, [destination])
    text = reports.quantized_summary(quantized) + progress.took()
    progress.show(text)
    return io.NodeOutput(name, ui=ui.PreviewText(text))
