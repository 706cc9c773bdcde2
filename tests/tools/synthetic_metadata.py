"""Metadata of checkpoints in our layout that no quantization made."""

from __future__ import annotations

from flux_fp4.quant.flux.config import FluxConfig
from flux_fp4.quant.quantized_checkpoint import QuantizedMetadata
from flux_fp4.quant.recipe import QuantizeOptions, named_recipe


def synthetic_metadata(
    config: FluxConfig, fp8_attention: bool, high_precision: str, content_digest: str
) -> QuantizedMetadata:
    """Return the metadata of random tensors; formats are told by the tensors, not by the recipe."""
    return QuantizedMetadata(
        variant=config.variant,
        config=config,
        options=QuantizeOptions(recipe=named_recipe("bf16"), fp8_attention=fp8_attention),
        high_precision=high_precision,  # type: ignore[arg-type]
        calibration_digest="",
        calibration_samples=0,
        calibration_seed=None,
        calibration_timesteps=0,
        velocity_sqnr_db=None,
        source_name="random",
        source_layout="bfl",
        source_bytes=1,
        source_digest="",
        content_digest=content_digest,
        linears=(),
        blocks=(),
    )
