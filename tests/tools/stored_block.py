"""A stored block in torch, run on a sample with outputs named as the contract does."""

from __future__ import annotations

import torch
from flux_fp4.quant.calibration import SampleState
from flux_fp4.quant.flux.blocks import (
    DoubleStreamBlock,
    SingleStreamBlock,
    block_from_config,
    block_modulation,
)
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint

Block = DoubleStreamBlock | SingleStreamBlock


def high_precision_block(checkpoint: QuantizedCheckpoint, name: str) -> Block:
    """The block with everything that is stored in high precision."""
    block = block_from_config(name, checkpoint.metadata.config).requires_grad_(False)
    tensors = checkpoint.block_tensors(name)
    quantized = {f"{key.removesuffix('.input_scale')}.weight" for key in tensors}
    state = block.state_dict()
    state |= {key: tensors[key].float() for key in state if key not in quantized}
    block.load_state_dict(state)
    return block


def run_by_name(
    block: Block, inputs: dict[str, torch.Tensor], state: SampleState
) -> dict[str, torch.Tensor]:
    """Run a block on the inputs of its ONNX graph."""
    mods = block_modulation(block, state.vec, state.shared_mods)
    if isinstance(block, DoubleStreamBlock):
        img, txt = block(inputs["img"], inputs["txt"], state.cos, state.sin, mods)
        return {"img_out": img, "txt_out": txt}
    return {"x_out": block(inputs["x"], state.cos, state.sin, mods)}
