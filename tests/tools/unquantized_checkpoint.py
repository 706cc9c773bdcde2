"""Checkpoints in our layout whose Linears are full precision: exported graphs without rounding."""

from __future__ import annotations

from pathlib import Path

from flux_fp4.quant.checkpoint_writer import CheckpointWriter
from flux_fp4.quant.flux.model import Flux
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint, QuantizedMetadata
from flux_fp4.quant.recipe import QuantizeOptions, named_recipe


def save_unquantized(model: Flux, path: Path) -> QuantizedCheckpoint:
    """Write an fp32 model."""
    state = model.state_dict()
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    with CheckpointWriter(path, layout, "unquantized") as writer:
        for name, tensor in state.items():
            writer.add(name, tensor)
        writer.finish(
            QuantizedMetadata(
                variant=model.config.variant,
                config=model.config,
                options=QuantizeOptions(recipe=named_recipe("bf16"), fp8_attention=False),
                high_precision="fp32",
                calibration_digest="",
                calibration_samples=0,
                calibration_seed=None,
                velocity_sqnr_db=None,
                source_name="random",
                source_layout="bfl",
                source_bytes=0,
                source_digest="",
                content_digest=writer.content_digest(),
                linears=(),
                blocks=(),
            )
        )
    return QuantizedCheckpoint.read(path)
