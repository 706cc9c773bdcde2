"""What the schemas of all nodes share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

if TYPE_CHECKING:
    import numpy as np

CATEGORY = "FLUX FP4"

Samples = io.Custom("FLUX_FP4_SAMPLES")
"""Link type of calibration samples (`quant.calibration.CalibrationSet`)."""


def description(node: type[io.ComfyNode]) -> str:
    """Return a node's docstring, which is written for users, as one paragraph."""
    return " ".join((node.__doc__ or "").split())


def report_with_picture(
    node: type[io.ComfyNode], text: str, pixels: np.ndarray, *outputs: Any
) -> io.NodeOutput:
    """Return a report and a picture ``[height, width, 3]`` in uint8; the node shows both."""
    import torch

    from .progress import NodeProgress

    NodeProgress(node.hidden.unique_id).show(text)
    image = torch.from_numpy(pixels)[None].float() / 255
    shown = {**ui.PreviewText(text).as_dict(), **ui.PreviewImage(image, cls=node).as_dict()}
    return io.NodeOutput(text, image, *outputs, ui=shown)
