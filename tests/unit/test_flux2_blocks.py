"""FLUX.2's quantized blocks: the exported file against torch, and what TensorRT-RTX makes of it."""

from __future__ import annotations

import pytest
import torch
from block_inputs import block_inputs, embedded_sample
from flux_fp4.quant.emulation import emulated_block
from flux_fp4.quant.flux.blocks import block_from_config
from flux_fp4.quant.flux.config import block_linears
from flux_fp4.quant.onnx_export import export_blocks, onnx_path
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.quant.stack import run_block
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_SPEC
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.reference_session import BlockSession
from mixed_checkpoint import FORMATS, linears_in_plans, save_mixed
from tiny_flux import TINY_FLUX2, ignore_progress, random_flux

MIN_BLOCK_DB = 50.0
"""See test_reference_matches_emulation.py."""


@pytest.fixture(scope="module", params=["nvfp4", "mixed"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> QuantizedCheckpoint:
    model = random_flux(TINY_FLUX2)
    kinds = FORMATS if request.param == "mixed" else (request.param,)
    formats = {
        name: kinds[index % len(kinds)] for index, name in enumerate(linears_in_plans(model))
    }
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    result = save_mixed(model, path, formats)
    export_blocks(path, ignore_progress)
    return result


@pytest.mark.parametrize("name", TINY_FLUX2.block_names)
def test_exported_block_computes_what_torch_emulates(
    checkpoint: QuantizedCheckpoint, name: str
) -> None:
    tensors = checkpoint.block_tensors(name)
    block = block_from_config(name, TINY_FLUX2).requires_grad_(False)
    kept = {key: tensors[key].float() for key in block.state_dict() if "norm" in key}
    linears = {
        f"{linear}.weight": tensors[f"{linear}.weight"].float()
        for linear in block_linears(name)
        if tensors[f"{linear}.weight"].dtype == torch.bfloat16
    }
    block.load_state_dict(kept | linears, strict=False)  # emulation replaces the others
    sample = embedded_sample(config=TINY_FLUX2)
    emulated = emulated_block(block, tensors)
    output = run_block(emulated, sample)
    expected = [output.img] if output.txt is None else [output.img, output.txt]
    feed = {key: value.numpy() for key, value in block_inputs(block, sample).items()}
    actual = BlockSession(onnx_path(checkpoint.path, name)).run(None, feed)
    for left, right in zip(expected, actual, strict=True):
        db = sqnr_db(left, torch.from_numpy(right))
        assert db >= MIN_BLOCK_DB, f"{name}: {db:.1f} dB, at least {MIN_BLOCK_DB} expected"


def test_every_fp4_linear_becomes_an_fp4_gemm(checkpoint: QuantizedCheckpoint) -> None:
    expected = {
        block: sum(
            checkpoint.tensors[f"{block}.{linear}.weight"].dtype == "U8"
            for linear in block_linears(block)
        )
        for block in TINY_FLUX2.block_names
    }
    manifest = build_engine(checkpoint.path.parent, SMALL_SPEC, ignore_progress)
    assert {entry.block: entry.fp4_gemms_found for entry in manifest.blocks} == expected
    assert [entry.fp8_mha_found for entry in manifest.blocks] == [1, 1, 1]
