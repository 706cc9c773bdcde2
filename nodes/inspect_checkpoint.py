"""Node: what a quantized checkpoint and its engines are, as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from . import paths
from .failures import told
from .fingerprint import file_state
from .schema import CATEGORY, description, report_with_picture


class Inspect(io.ComfyNode):
    """Reports on a quantized checkpoint: recipe, sizes before and after, the format of every Linear
    and how well it survived quantization (SQNR, higher is better), and for each engine the FP4 and
    FP8 kernels found in its plans and the versions it was built with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4Inspect",
            display_name="Inspect FLUX FP4",
            category=CATEGORY,
            description=description(Inspect),
            search_aliases=["fp4", "nvfp4", "sqnr", "report", "quantization error", "info"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=paths.quantized_checkpoints(),
                    tooltip="Quantized checkpoint in models/flux_fp4; choose one, or connect "
                    "'Build TensorRT Engine' to report after the build.",
                )
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The report as plain text."),
                io.Image.Output(display_name="chart", tooltip="SQNR of every block and Linear."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None) -> Any:
        if checkpoint is None:
            return None
        file = _checkpoint_file(checkpoint)
        manifests = sorted(file.parent.glob(f"*/{paths.MANIFEST}"))
        return [(path.parent.name, file_state(path)) for path in (file, *manifests)]

    @classmethod
    @told
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        from ..quant.quality.charts import sqnr_chart
        from ..quant.quantized_checkpoint import QuantizedCheckpoint
        from . import reports

        file = _checkpoint_file(checkpoint)
        quantized = QuantizedCheckpoint.read(file)
        chart = sqnr_chart(quantized.metadata, quantized.name)
        return report_with_picture(cls, reports.full_report(file), chart)


def _checkpoint_file(name: str) -> Path:
    # 'Build TensorRT Engine' hands over "<checkpoint>/<target>".
    return paths.quantized_checkpoint(name.partition("/")[0])
