"""Blocks that take an attention mask: exported by quant/, built and run by trt_runtime/."""

from __future__ import annotations

import pytest
import torch
from block_inputs import block_inputs, embedded_sample
from flux_fp4.quant.emulation import emulated_block
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.recipe import QuantizeOptions
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.tests.unit.trt_runtime.block_inputs import block_inputs as inputs_of
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_SPEC
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.errors.run import BlockInputError
from flux_fp4.trt_runtime.manifest import load_manifest
from flux_fp4.trt_runtime.reference import ReferenceExecutor
from flux_fp4.trt_runtime.selection import Selection
from flux_fp4.trt_runtime.variant_plans import build_selected, built_variants
from quantize_tiny import quantize
from stored_block import high_precision_block, run_by_name
from tiny_flux import ignore_progress, random_flux, save_flux
from torch import Tensor
from torch.nn import functional

DOUBLE, SINGLE = "double_blocks.0", "single_blocks.1"
EXACT_DB = 30.0
"""fp32 sums in another order: 80 dB and more, unless a value crosses an FP4 or FP8 edge."""


@pytest.fixture(scope="module", params=[True, False], ids=["fp8 attention", "bf16 attention"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> QuantizedCheckpoint:
    folder = tmp_path_factory.mktemp("model")
    source = save_flux(random_flux(), folder / "source.safetensors")
    options = QuantizeOptions(fp8_attention=request.param)
    result = quantize(source, folder / "tiny" / "tiny.safetensors", options)
    export_blocks(result.path, ignore_progress)
    build_engine(result.path.parent, SMALL_SPEC, ignore_progress)
    return result


@pytest.fixture
def executor(checkpoint: QuantizedCheckpoint) -> ReferenceExecutor:
    executor = ReferenceExecutor(checkpoint.path.parent)
    executor.load(torch.device("cpu"))
    return executor


@pytest.fixture
def engine(checkpoint: QuantizedCheckpoint) -> Engine:
    engine = Engine.open(checkpoint.path.parent / SMALL_SPEC.folder_name, "reference")
    engine.load(torch.device("cpu"))
    return engine


def random_mask(tokens: int) -> Tensor:
    mask = 2 * torch.randn(1, 1, tokens, tokens, generator=torch.Generator().manual_seed(5))
    return mask.masked_fill(mask > 3, -30000.0)


def masked_softmax(mask: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the torch blocks mask their attention: in FP8 it is written out, in bf16 it is SDPA."""
    softmax, sdpa = functional.softmax, functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "softmax", lambda x, dim: softmax(x + mask, dim=dim))
    monkeypatch.setattr(
        functional,
        "scaled_dot_product_attention",
        lambda q, k, v: sdpa(q, k, v, attn_mask=mask),
    )


@pytest.mark.parametrize("block", [DOUBLE, SINGLE])
def test_reference_adds_the_mask_to_the_scores(
    checkpoint: QuantizedCheckpoint,
    executor: ReferenceExecutor,
    block: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = high_precision_block(checkpoint, block)
    module = emulated_block(stored, checkpoint.block_tensors(block))
    state = embedded_sample(config=checkpoint.metadata.config)
    inputs = block_inputs(module, state)
    plain = executor.run(block, inputs)
    mask = random_mask(inputs["cos"].shape[1])
    with monkeypatch.context() as context:
        masked_softmax(mask, context)
        expected = run_by_name(module, inputs, state)
    executor.use(Selection(masked=True))
    actual = executor.run(block, {**inputs, "mask": mask})
    for name, value in actual.items():
        before = inputs[name.removesuffix("_out")]
        db = sqnr_db(expected[name] - before, value - before)
        assert db > EXACT_DB, f"{name}: {db:.1f} dB"
        change = sqnr_db(value - before, plain[name] - before)
        assert change < EXACT_DB, f"the mask is {change:.1f} dB of {name}: too little"


@pytest.mark.parametrize("block", [DOUBLE, SINGLE])
def test_a_mask_of_zeros_changes_nothing_and_the_base_comes_back(
    checkpoint: QuantizedCheckpoint, executor: ReferenceExecutor, block: str
) -> None:
    inputs = block_inputs(
        high_precision_block(checkpoint, block), embedded_sample(config=checkpoint.metadata.config)
    )
    plain, tokens = executor.run(block, inputs), inputs["cos"].shape[1]
    executor.use(Selection(masked=True))
    zeros = executor.run(block, {**inputs, "mask": torch.zeros(1, 1, tokens, tokens)})
    executor.use(Selection())
    again = executor.run(block, inputs)
    for name, value in plain.items():
        assert torch.equal(zeros[name], value)
        assert torch.equal(again[name], value)


def single_block_inputs(engine: Engine, batch: int = 1) -> dict[str, Tensor]:
    entry = next(entry for entry in engine.manifest.blocks if entry.block == SINGLE)
    return inputs_of(entry, img_tokens=40, txt_tokens=8, batch=batch)


def test_one_mask_serves_a_batch_that_is_split(engine: Engine) -> None:
    assert engine.manifest.profile.max_batch < 3
    inputs, mask = single_block_inputs(engine, batch=3), random_mask(48)
    engine.use(Selection(masked=True))
    together = engine.run(SINGLE, {**inputs, "mask": mask})["x_out"]
    for index in range(3):
        alone = {name: tensor[index : index + 1] for name, tensor in inputs.items()}
        # sums of a batch may be made in another order
        db = sqnr_db(engine.run(SINGLE, {**alone, "mask": mask})["x_out"], together[index][None])
        assert db > EXACT_DB, f"{db:.1f} dB"


@pytest.mark.parametrize("masked", [False, True])
def test_mask_goes_with_the_selection(engine: Engine, masked: bool) -> None:
    inputs = single_block_inputs(engine)
    engine.use(Selection(masked=masked))
    wrong = {} if masked else {"mask": torch.zeros(1, 1, 48, 48)}
    with pytest.raises(BlockInputError, match="mask"):
        engine.run(SINGLE, inputs | wrong)
    with pytest.raises(BlockInputError, match="mask"):
        engine.run(SINGLE, {**inputs, "mask": torch.zeros(1, 2, 48, 48)})


def test_plans_keep_every_format(checkpoint: QuantizedCheckpoint) -> None:
    engine_dir = checkpoint.path.parent / SMALL_SPEC.folder_name
    engine = load_manifest(engine_dir)
    blocks = engine.expected_blocks
    build_selected(engine_dir, Selection({SINGLE: {}}, masked=True), ignore_progress)
    found = built_variants(engine_dir, engine)
    names = [f"{name}.lora.mask" if name == SINGLE else f"{name}.mask" for name in blocks]
    assert list(found) == names
    for plain, name in zip(engine.blocks, names, strict=True):
        for count in ("fp4_gemms_found", "fp8_mha_expected", "fp8_mha_found"):
            assert getattr(found[name], count) == getattr(plain, count)
        assert found[name].fp8_mha_found == checkpoint.metadata.fp8_attention
