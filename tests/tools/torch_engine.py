"""An engine that computes block plans with ComfyUI's own torch blocks, for tests without plans."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, ModulationOut, SingleStreamBlock
from torch import Tensor


class TorchEngine:
    """Has the methods of `trt_runtime.engine.Engine` that a MODEL uses, and counts their calls."""

    weight_bytes = 5_000_000

    def __init__(self, blocks: Mapping[str, DoubleStreamBlock | SingleStreamBlock]) -> None:
        """Take stock blocks by name; their own modulation is not used."""
        self.blocks = blocks
        self.device: torch.device | None = None
        self.loads = self.unloads = self.runs = 0
        for block in blocks.values():
            # ComfyUI's own switch for models whose modulation is computed elsewhere (FLUX.2)
            block.modulation = False if isinstance(block, DoubleStreamBlock) else None

    @property
    def loaded(self) -> bool:
        return self.device is not None

    def load(self, device: torch.device) -> None:
        if self.device is None:
            self.loads += 1
        self.device = device

    def unload(self) -> None:
        self.unloads += self.device is not None
        self.device = None

    def activation_bytes(self, batch: int, img_tokens: int, txt_tokens: int) -> int:
        return 1000 * batch * (img_tokens + txt_tokens)

    def run(self, block: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.loaded, f"{block} ran before load()"
        self.runs += 1
        cos, sin = inputs["cos"], inputs["sin"]
        pe = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))[:, None]
        module = self.blocks[block]
        if isinstance(module, SingleStreamBlock):
            x = module(inputs["x"].clone(), vec=_modulation(inputs, "mod"), pe=pe)
            return {"x_out": x}
        vec = tuple(
            tuple(_modulation(inputs, f"{stream}_mod{part}") for part in (1, 2))
            for stream in ("img", "txt")
        )
        img, txt = module(inputs["img"].clone(), inputs["txt"].clone(), vec=vec, pe=pe)
        return {"img_out": img, "txt_out": txt}


def _modulation(inputs: Mapping[str, Tensor], prefix: str) -> ModulationOut:
    return ModulationOut(*(inputs[f"{prefix}_{part}"] for part in ("shift", "scale", "gate")))
