"""Node: FLUX checkpoint to MODEL, doing whatever is still missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..quant.recipe import QuantizeOptions
from ..trt_runtime.targets import build_spec
from . import paths
from .build import MAX_BATCH, MAX_MEGAPIXELS, MAX_TEXT_TOKENS, TARGET, WORKERS
from .errors import CalibrationMissingError
from .failures import told
from .fingerprint import OutputLedger
from .load import (
    BACKEND,
    CUDA_GRAPHS,
    ENGINE_MEMORY,
    LORA,
    MAIN_MEMORY,
    MODEL_OUTPUT,
    MODULATION,
    RUNTIME,
    engine_options,
)
from .quantize import source_input, source_state
from .recipe_inputs import ADVANCED, FP8_ATTENTION, options_from, recipe_input, recipe_state
from .schema import CATEGORY, Samples, description


class EngineFromCheckpoint(io.ComfyNode):
    """Makes a FLUX checkpoint into an FP4 engine and loads it as MODEL. Quantizes, exports and
    builds only what is missing or outdated, so later runs just load. Calibration samples are needed
    once, for quantization."""

    ledger = OutputLedger()

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4EngineFromCheckpoint",
            display_name="FLUX FP4 from Checkpoint",
            category=CATEGORY,
            description=description(EngineFromCheckpoint),
            search_aliases=["fp4", "nvfp4", "tensorrt", "trt", "speed up flux", "unet loader"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                source_input(),
                recipe_input(),
                FP8_ATTENTION,
                TARGET,
                MAX_MEGAPIXELS,
                MAX_BATCH,
                MAX_TEXT_TOKENS,
                BACKEND,
                WORKERS,
                Samples.Input(
                    "samples",
                    optional=True,
                    tooltip="What 'FLUX Calibration Samples' made of your pictures. Needed for the "
                    "first run; when connected, other samples quantize the checkpoint again.",
                ),
                *ADVANCED,
                LORA,
                MODULATION,
                ENGINE_MEMORY,
                CUDA_GRAPHS,
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=MODEL_OUTPUT)],
        )

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
        recipe: str,
        fp8_attention: bool,
        target: str,
        max_megapixels: float,
        max_batch: int,
        max_text_tokens: int,
        backend: str,
        workers: int,
        samples: Any = None,
        lora: str = RUNTIME,
        modulation_memory: str = MAIN_MEMORY,
        engine_memory: float = 0.0,
        cuda_graphs: bool = False,
        **advanced: Any,
    ) -> io.NodeOutput:
        from . import reports, stages
        from .progress import NodeProgress

        options = options_from(recipe, fp8_attention, **advanced)
        spec = build_spec(target, max_megapixels, max_batch, max_text_tokens)
        progress = NodeProgress(cls.hidden.unique_id)
        quantized = _quantized(checkpoint, options, target, samples, progress)
        stages.export(quantized, progress)
        folder, _ = stages.build(quantized, spec, workers, progress)
        loading = engine_options(lora, modulation_memory, engine_memory, cuda_graphs)
        model = stages.load(folder, backend, loading)
        cls.ledger.record(cls.hidden.unique_id, [quantized, folder / paths.MANIFEST])
        text = reports.model_summary(paths.engine_name(folder), model) + progress.took()
        progress.show(text)
        return io.NodeOutput(model, ui=ui.PreviewText(text))


def quantized_name(checkpoint: str, options: QuantizeOptions) -> str:
    """Return the name under which this node keeps the quantized form of a checkpoint.

    It is made of the file, the recipe and every option that is not at its default, so that trying
    another option never replaces an earlier result.
    """
    # Sub-folders become part of the name: two fine-tunes may share a file name.
    stem = checkpoint.removesuffix(".index.json").removesuffix(".safetensors")
    parts = [stem.replace("\\", "/").replace("/", "-"), options.recipe.name]
    budget, defaults = options.recipe.auto, QuantizeOptions()
    if budget is not None and budget.floor_db is not None:
        parts.append(f"{budget.floor_db:g}dB")
    if budget is not None and budget.max_bytes is not None:
        parts.append(f"{budget.max_bytes / 2**30:g}GiB")
    if not options.fp8_attention:
        parts.append("bf16-attention")
    if options.modulation != defaults.modulation:
        parts.append(f"{options.modulation}-modulation")
    if options.percentile != defaults.percentile:
        parts.append(f"percentile{options.percentile:g}")
    if options.headroom != defaults.headroom:
        parts.append(f"headroom{options.headroom:g}")
    return "-".join(parts)


def _quantized(
    checkpoint: str, options: QuantizeOptions, target: str, samples: Any, progress: Any
) -> Path:
    from ..quant.quantized_checkpoint import up_to_date_checkpoint
    from ..quant.sources.source import open_source
    from . import preflight, stages

    source = open_source(paths.source_checkpoint(checkpoint))
    name = quantized_name(checkpoint, options)
    destination = paths.new_checkpoint(name)
    digest = None if samples is None else samples.digest()
    if up_to_date_checkpoint(source, destination, options, digest) is None:
        if samples is None:
            raise CalibrationMissingError(checkpoint, name)
        preflight.require(source, options, target, destination.parent)
        stages.quantize(source, destination, samples, options, progress)
    return destination
