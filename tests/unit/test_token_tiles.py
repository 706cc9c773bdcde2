"""Padding of tokens to whole tiles shows in no result, whatever the number of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from block_inputs import block_inputs
from flux_fp4.quant.calibration import SampleState
from flux_fp4.quant.emulation import emulated_block
from flux_fp4.quant.onnx_export import export_blocks, onnx_path
from flux_fp4.quant.onnx_export.blocks import block_model
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.trt_runtime.reference_session import BlockSession
from mixed_checkpoint import FORMATS, linears_in_plans, save_mixed
from stored_block import high_precision_block, run_by_name
from tiny_flux import TINY, ignore_progress, random_flux

TOKENS = [(1, 32), (10, 127), (128, 128), (129, 255), (127, 1)]
"""Text and image tokens: one tile or two, whole or not, and one token alone."""

SAMPLES = 3
BEST_DB, MIN_DB = 40.0, 25.0
"""A value that crosses an edge of FP4, which other orders of sums decide, weighs most where a
stream has a single token. With the padding in front of the tokens, where attention sees it, all
measured below 10 dB."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    model, path = random_flux(), tmp_path_factory.mktemp("model") / "tiny.safetensors"
    result = save_mixed(model, path, dict.fromkeys(linears_in_plans(model), "nvfp4"))
    export_blocks(path, ignore_progress)
    return result


def random_state(txt_tokens: int, img_tokens: int, batch: int, seed: int) -> SampleState:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    tokens, dim = txt_tokens + img_tokens, TINY.hidden_size
    angle = normal(tokens, TINY.head_dim // 2)
    return SampleState(
        normal(img_tokens, dim), normal(txt_tokens, dim), normal(dim), angle.cos(), angle.sin()
    )


@pytest.mark.parametrize("name", ["double_blocks.0", "single_blocks.1"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("txt_tokens", "img_tokens"), TOKENS)
def test_padding_does_not_show(
    checkpoint: QuantizedCheckpoint, name: str, batch: int, txt_tokens: int, img_tokens: int
) -> None:
    module = high_precision_block(checkpoint, name)
    emulated = emulated_block(module, checkpoint.block_tensors(name))
    session = BlockSession(onnx_path(checkpoint.path, name))
    found = []
    for seed in range(SAMPLES):
        state = random_state(txt_tokens, img_tokens, batch, seed)
        inputs = block_inputs(module, state)
        outputs = run_by_name(emulated, inputs, state)
        results = session.run(list(outputs), {key: value.numpy() for key, value in inputs.items()})
        for expected, actual in zip(outputs.values(), results, strict=True):
            assert actual.shape == tuple(expected.shape)
        pairs = zip(outputs.values(), results, strict=True)
        found.append(min(sqnr_db(expected, torch.from_numpy(actual)) for expected, actual in pairs))
    measured = ", ".join(f"{db:.1f}" for db in found)
    assert max(found) >= BEST_DB, f"{measured} dB, once at least {BEST_DB} expected"
    assert min(found) >= MIN_DB, f"{measured} dB, at least {MIN_DB} expected"


@pytest.mark.parametrize("kind", FORMATS)
def test_only_blocks_with_fp4_are_padded(tmp_path: Path, kind: str) -> None:
    model = random_flux()
    formats = dict.fromkeys(linears_in_plans(model), kind)
    stored = save_mixed(model, tmp_path / "tiny.safetensors", formats)
    for name in ("double_blocks.0", "single_blocks.0"):
        operators = {node.op_type for node in block_model(stored, name).graph}
        assert ("Pad" in operators) == kind.startswith("nvfp4")
