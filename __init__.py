"""ComfyUI custom nodes that run FLUX as NVFP4 TensorRT blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import FluxFP4Extension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> FluxFP4Extension:
    """Return the extension that registers the nodes; ComfyUI calls this once at start."""
    from .nodes import FluxFP4Extension

    return FluxFP4Extension()
