"""What the schemas of all nodes share."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "FLUX FP4"

Samples = io.Custom("FLUX_FP4_SAMPLES")
"""Link type of calibration samples (`quant.calibration.CalibrationSet`)."""


def description(node: type[io.ComfyNode]) -> str:
    """Return a node's docstring, which is written for users, as one paragraph."""
    return " ".join((node.__doc__ or "").split())
