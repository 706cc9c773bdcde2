"""Write given tensors as a checkpoint in our layout, whatever quantization would make of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flux_fp4.quant.checkpoint_writer import CheckpointWriter
from flux_fp4.quant.flux.config import FluxConfig
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from synthetic_metadata import synthetic_metadata
from torch import Tensor


def save_stored(
    state: Mapping[str, Tensor],
    path: Path,
    config: FluxConfig,
    fp8_attention: bool = False,
    high_precision: str = "bf16",
) -> QuantizedCheckpoint:
    """Write tensors by their final names."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    with CheckpointWriter(path, layout, "stored") as writer:
        for name, tensor in state.items():
            writer.add(name, tensor)
        digest = writer.content_digest()
        writer.finish(synthetic_metadata(config, fp8_attention, high_precision, digest))
    return QuantizedCheckpoint.read(path)
