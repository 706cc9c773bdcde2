"""The only layer that imports ComfyUI: reads inputs, calls down, reports."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io


class FluxFP4Extension(ComfyExtension):
    """Registers the node classes with ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return []
