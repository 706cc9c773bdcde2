"""Node: quantized checkpoint to a file for ComfyUI's own loader."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from . import paths
from .failures import told
from .fingerprint import OutputLedger, file_state
from .schema import CATEGORY, description


class SaveNative(io.ComfyNode):
    """Saves a quantized checkpoint in ComfyUI's own NVFP4 form to models/diffusion_models, for
    'Load Diffusion Model'. The file needs no engine and no node pack, and takes LoRAs."""

    ledger = OutputLedger()

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4SaveNative",
            display_name="Save as ComfyUI NVFP4 Checkpoint",
            category=CATEGORY,
            description=description(SaveNative),
            search_aliases=["fp4", "nvfp4", "save", "native", "comfy_quant", "diffusion model"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=paths.quantized_checkpoints(),
                    tooltip="Quantized checkpoint in models/flux_fp4, made with the recipe "
                    "nvfp4-max or nvfp4-mse; choose one, or connect 'Quantize FLUX to FP4'.",
                ),
                io.String.Input(
                    "name",
                    default="flux1-dev-nvfp4-comfyui",
                    tooltip="Name of the file in models/diffusion_models. A file that this node "
                    "did not make is never replaced.",
                ),
            ],
            outputs=[
                io.Combo.Output(
                    display_name="diffusion_model",
                    tooltip="Name of the file, for 'Load Diffusion Model'.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None, name: str | None) -> tuple[Any, int]:
        source = checkpoint and file_state(paths.quantized_checkpoint(checkpoint))
        return source, cls.ledger.fingerprint(cls.hidden.unique_id)

    @classmethod
    @told
    def execute(cls, checkpoint: str, name: str) -> io.NodeOutput:
        from ..quant.native_checkpoint import save_native_checkpoint
        from ..quant.quantized_checkpoint import QuantizedCheckpoint
        from .progress import NodeProgress

        progress = NodeProgress(cls.hidden.unique_id)
        file = paths.native_checkpoint(name)
        quantized = QuantizedCheckpoint.read(paths.quantized_checkpoint(checkpoint))
        save_native_checkpoint(quantized, file, progress)
        cls.ledger.record(cls.hidden.unique_id, [file])
        text = f"{file.name}: {file.stat().st_size / 2**30:,.2f} GiB in {file.parent}"
        progress.show(text)
        return io.NodeOutput(file.name, ui=ui.PreviewText(text))
