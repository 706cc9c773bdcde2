"""Node: quantized checkpoint to ONNX."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from . import paths
from .failures import told
from .fingerprint import OutputLedger, file_state
from .schema import CATEGORY, description


class ExportONNX(io.ComfyNode):
    """Writes one small ONNX file per block beside a quantized checkpoint. The files hold no
    weights, they point into the checkpoint, so this takes seconds and almost no space."""

    ledger = OutputLedger()

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4ExportONNX",
            display_name="Export FLUX FP4 to ONNX",
            category=CATEGORY,
            description=description(ExportONNX),
            search_aliases=["fp4", "nvfp4", "onnx", "export", "tensorrt"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=paths.quantized_checkpoints(),
                    tooltip="Quantized checkpoint in models/flux_fp4; choose one, or connect "
                    "'Quantize FLUX to FP4'.",
                ),
                io.Boolean.Input(
                    "whole_transformer",
                    display_name="whole transformer",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Also write transformer.onnx, the whole model as one file, for other "
                    "runtimes. Engines do not need it. Not possible with modulation in nvfp4.",
                ),
            ],
            outputs=[
                io.Combo.Output(
                    display_name="checkpoint",
                    tooltip="Name of the exported checkpoint, for 'Build TensorRT Engine'.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None, **_options: Any) -> tuple[Any, int]:
        source = checkpoint and file_state(paths.quantized_checkpoint(checkpoint))
        return source, cls.ledger.fingerprint(cls.hidden.unique_id)

    @classmethod
    @told
    def execute(cls, checkpoint: str, whole_transformer: bool = False) -> io.NodeOutput:
        from . import stages
        from .progress import NodeProgress

        progress = NodeProgress(cls.hidden.unique_id)
        source = paths.quantized_checkpoint(checkpoint)
        files = stages.export(source, progress)
        text = f"{checkpoint}: {len(files)} block ONNX files, {_kibibytes(files)} in all"
        if whole_transformer:
            whole = stages.export_transformer(source, progress)
            files = (*files, whole)
            text += f"\n{whole.name}: {_kibibytes([whole])} in {whole.parent}"
        cls.ledger.record(cls.hidden.unique_id, files)
        text += progress.took()
        progress.show(text)
        return io.NodeOutput(checkpoint, ui=ui.PreviewText(text))


def _kibibytes(files: Iterable[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 2**10:,.0f} KiB"
