"""Every variant through quantization and export, on models of random weights."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from flux_fp4.quant.onnx_export import export_blocks
from quantize_tiny import quantize, with_recipe
from tiny_flux import TINY_VARIANTS, ignore_progress, random_flux, random_samples, save_flux

MIN_UPDATE_DB = 11.0
"""Of what a block adds to its input. Random blocks of FLUX.1 measure at least 13.9 dB, of FLUX.2
12.6: in a gated MLP both factors of each product carry noise."""


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_variant_is_quantized_and_exported(variant: str, tmp_path: Path) -> None:
    config = TINY_VARIANTS[variant]
    source = save_flux(random_flux(config), tmp_path / "source.safetensors")
    path = tmp_path / "tiny" / "tiny.safetensors"
    checkpoint = quantize(source, path, with_recipe("nvfp4-max"), random_samples(config))
    assert checkpoint.metadata.variant == variant
    assert checkpoint.metadata.config == config
    updates = {block.name: block.update_sqnr_db for block in checkpoint.metadata.blocks}
    assert min(updates.values()) >= MIN_UPDATE_DB, updates
    paths = export_blocks(path, ignore_progress)
    assert [file.stem for file in paths] == list(config.block_names)
    inputs = {value.name for value in onnx.load(paths[-1], load_external_data=False).graph.input}
    assert inputs == {"x", "cos", "sin", "mod_shift", "mod_scale", "mod_gate"}
