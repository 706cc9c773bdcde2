"""Node: ONNX blocks to TensorRT plans."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..trt_runtime.targets import TARGETS, build_spec
from . import paths
from .failures import told
from .fingerprint import OutputLedger, file_state
from .schema import CATEGORY, description

TARGET = io.Combo.Input(
    "target",
    options=list(TARGETS),
    default="sm120",
    tooltip="GPU generation to build for; this machine needs no such GPU. "
    + "; ".join(f"{name}: {gpus}" for name, (gpus, _, _) in TARGETS.items())
    + ". Names with 'tensorrt-' need the tensorrt package and such a GPU in this machine.",
)
MAX_MEGAPIXELS = io.Float.Input(
    "max_megapixels",
    display_name="max megapixels",
    default=2.0,
    min=1.0,
    max=16.0,
    step=0.1,
    tooltip="Largest picture, in units of 1024 x 1024 pixels. Reference pictures (Kontext) count "
    "as well. A larger limit only costs memory when it is used.",
)
MAX_BATCH = io.Int.Input(
    "max_batch",
    display_name="max batch",
    default=1,
    min=1,
    max=64,
    tooltip="Pictures per engine call; with CFG above 1 every picture counts twice. Larger batches "
    "still work, they are split.",
)
MAX_TEXT_TOKENS = io.Int.Input(
    "max_text_tokens",
    display_name="max text tokens",
    default=512,
    min=16,
    max=8192,
    step=16,
    tooltip="Longest text. T5 gives at least 256 tokens; every Redux picture adds 729.",
)
WORKERS = io.Int.Input(
    "workers",
    default=0,
    min=0,
    max=16,
    advanced=True,
    tooltip="Build processes that run side by side. 0 chooses by free cores and memory; each takes "
    "a core and about 1 GB of RAM. Lower it if memory runs out.",
)


class BuildEngine(io.ComfyNode):
    """Builds TensorRT plans from the ONNX blocks of a quantized checkpoint, for the chosen GPU and
    up to the chosen sizes. Finished blocks are kept when you cancel, and the next run goes on with
    the first missing one."""

    ledger = OutputLedger()

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4BuildEngine",
            display_name="Build TensorRT Engine",
            category=CATEGORY,
            description=description(BuildEngine),
            search_aliases=["fp4", "nvfp4", "tensorrt", "trt", "rtx", "engine", "compile"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=paths.exported_checkpoints(),
                    tooltip="Quantized checkpoint with ONNX files; choose one, or connect 'Export "
                    "FLUX FP4 to ONNX'.",
                ),
                TARGET,
                MAX_MEGAPIXELS,
                MAX_BATCH,
                MAX_TEXT_TOKENS,
                WORKERS,
            ],
            outputs=[
                io.Combo.Output(
                    display_name="engine",
                    tooltip="Name of the engine, for 'Load FLUX FP4 Engine'.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None, **_options: Any) -> tuple[Any, int]:
        source = checkpoint and file_state(paths.quantized_checkpoint(checkpoint))
        return source, cls.ledger.fingerprint(cls.hidden.unique_id)

    @classmethod
    @told
    def execute(
        cls,
        checkpoint: str,
        target: str,
        max_megapixels: float,
        max_batch: int,
        max_text_tokens: int,
        workers: int,
    ) -> io.NodeOutput:
        from . import reports, stages
        from .progress import NodeProgress

        source = paths.quantized_checkpoint(checkpoint)
        spec = build_spec(target, max_megapixels, max_batch, max_text_tokens)
        progress = NodeProgress(cls.hidden.unique_id)
        folder, manifest = stages.build(source, spec, workers, progress)
        cls.ledger.record(cls.hidden.unique_id, [folder / paths.MANIFEST])
        name = paths.engine_name(folder)
        text = reports.engine_summary(name, manifest) + progress.took()
        progress.show(text)
        return io.NodeOutput(name, ui=ui.PreviewText(text))
