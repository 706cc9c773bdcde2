"""Inputs of one block by the names of the ONNX contract."""

from __future__ import annotations

import torch
from flux_fp4.quant.calibration import SampleState, embedded_samples
from flux_fp4.quant.flux.blocks import DoubleStreamBlock, SingleStreamBlock, block_modulation
from flux_fp4.quant.flux.config import FluxConfig
from flux_fp4.quant.onnx_export.contract import DOUBLE_MODULATION, SINGLE_MODULATION
from tiny_flux import TINY, random_flux, random_samples


def embedded_sample(index: int = 1, config: FluxConfig = TINY) -> SampleState:
    """A calibration sample before the first block, fp32."""
    with torch.no_grad():
        return embedded_samples(random_samples(config), random_flux(config), config)[index]


def block_inputs(
    block: DoubleStreamBlock | SingleStreamBlock, state: SampleState
) -> dict[str, torch.Tensor]:
    """What the block's ONNX graph takes."""
    mods = block_modulation(block, state.vec, state.shared_mods)
    inputs = {"cos": state.cos, "sin": state.sin}
    if isinstance(block, DoubleStreamBlock):
        assert state.txt is not None
        names = DOUBLE_MODULATION
        inputs |= {"img": state.img, "txt": state.txt}
    else:
        names = SINGLE_MODULATION
        tokens = state.img if state.txt is None else torch.cat((state.txt, state.img), dim=1)
        inputs |= {"x": tokens}
    return inputs | dict(zip(names, mods, strict=True))
