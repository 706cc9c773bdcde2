"""Blocks with low-rank factors as inputs: exported by quant/, built and run by trt_runtime/."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from block_inputs import block_inputs, embedded_sample
from flux_fp4.quant.emulation import EmulatedLinear, emulated_block
from flux_fp4.quant.flux.config import block_linears
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_PROFILE, SMALL_SPEC
from flux_fp4.trt_runtime.adapters import LowRank, factor_shapes
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.contract import variant_name
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.errors.backend import EngineVersionError
from flux_fp4.trt_runtime.errors.blocks import BlockContractError, BlocksMissingError
from flux_fp4.trt_runtime.errors.engine import EngineStaleError, ManifestInvalidError
from flux_fp4.trt_runtime.manifest import (
    EngineManifest,
    PlanEntry,
    load_manifest,
    read_manifest_file,
    verify_engine,
)
from flux_fp4.trt_runtime.progress import Progress
from flux_fp4.trt_runtime.reference import ReferenceExecutor
from flux_fp4.trt_runtime.selection import Selection
from flux_fp4.trt_runtime.signature import read_signature
from flux_fp4.trt_runtime.variant_plans import build_selected, built_variants
from mixed_checkpoint import FORMATS, linears_in_plans, save_mixed
from quantize_tiny import quantize, with_recipe
from stored_block import Block, high_precision_block, run_by_name
from tiny_flux import TINY, TINY_FLUX2, ignore_progress, random_flux, save_flux

DOUBLE, SINGLE = "double_blocks.0", "single_blocks.1"
EXACT_DB = 80.0
"""Differences in the order of fp32 sums alone: 82 to 138 dB measured."""

CROSSING_DB = 30.0
"""Where such a difference moves a value across an FP4 rounding edge, in 2 of 10 adapters: 33 and
40 dB measured."""


def quantized(folder: Path, kind: str) -> QuantizedCheckpoint:
    """An exported checkpoint with Linears of one kind."""
    path = folder / "tiny" / "tiny.safetensors"
    if kind == "svdquant":
        source = save_flux(random_flux(), folder / "source.safetensors")
        checkpoint = quantize(source, path, with_recipe("nvfp4-svdquant-r16"))
    else:
        path.parent.mkdir()
        model = random_flux(TINY_FLUX2 if kind == "FLUX.2" else TINY)
        linears = linears_in_plans(model)
        formats = dict.fromkeys(linears, kind if kind in FORMATS else "nvfp4")
        checkpoint = save_mixed(model, path, formats)
    export_blocks(path, ignore_progress)
    return checkpoint


@pytest.fixture(scope="module", params=[*FORMATS, "svdquant", "FLUX.2"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> QuantizedCheckpoint:
    return quantized(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished engine without variants; not to be changed."""
    checkpoint = quantized(tmp_path_factory.mktemp("model"), "nvfp4")
    build_engine(checkpoint.path.parent, SMALL_SPEC, ignore_progress)
    return checkpoint.path.parent / SMALL_SPEC.folder_name


@pytest.fixture
def engine_dir(built: Path, tmp_path: Path) -> Path:
    """A finished engine that the test may change."""
    shutil.copytree(built.parent, tmp_path / "tiny")
    return tmp_path / "tiny" / built.name


def adapters_for(checkpoint: QuantizedCheckpoint, block: str, seed: int = 0) -> dict[str, LowRank]:
    """Adapters as large as the Linears, for every second one of them, with different ranks."""
    specs = read_signature(
        checkpoint.path.with_name(f"{variant_name(block, lora=True)}.onnx")
    ).inputs
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for rank, (linear, (width, outputs)) in enumerate(factor_shapes(specs).items(), start=7):
        if rank % 2:
            down = torch.randn(width, rank, generator=generator) * width**-0.5
            adapters[linear] = LowRank(
                down, torch.randn(rank, outputs, generator=generator) * rank**-0.5
            )
    return adapters


def emulated(checkpoint: QuantizedCheckpoint, block: str, adapters: dict[str, LowRank]) -> Block:
    """The block in torch with the same branches."""
    stored = high_precision_block(checkpoint, block)
    module = emulated_block(stored, checkpoint.block_tensors(block))
    for linear, adapter in adapters.items():
        branched = module.get_submodule(linear)
        if isinstance(branched, torch.nn.Linear):
            branched = EmulatedLinear(branched.weight, branched.bias)
            module.set_submodule(linear, branched)
        down, up = adapter.down.T, adapter.up.T
        if branched.branch is not None:
            down = torch.cat((branched.branch[0].float(), down))
            up = torch.cat((branched.branch[1].float(), up), dim=1)
        branched.branch = (down, up)
    return module


def branches(checkpoint: QuantizedCheckpoint, block: str) -> dict[str, LowRank]:
    """SVDQuant's branches as the variant wants them: it has none of its own."""
    tensors = checkpoint.block_tensors(block)
    return {
        linear: LowRank(
            tensors[f"{linear}.svd_down"].float().T, tensors[f"{linear}.svd_up"].float().T
        )
        for linear in block_linears(block)
        if f"{linear}.svd_down" in tensors
    }


@pytest.mark.parametrize("block", [DOUBLE, SINGLE])
def test_reference_adds_the_factors_to_each_linear(
    checkpoint: QuantizedCheckpoint, block: str
) -> None:
    executor = reference(checkpoint)
    found = [
        sqnr_with_adapters(checkpoint, executor, block, adapters_for(checkpoint, block, seed))
        for seed in range(3)
    ]
    assert min(found) > CROSSING_DB, f"{found} dB"
    assert max(found) > EXACT_DB, f"{found} dB"


def sqnr_with_adapters(
    checkpoint: QuantizedCheckpoint,
    executor: ReferenceExecutor,
    block: str,
    adapters: dict[str, LowRank],
) -> float:
    """Smallest SQNR of what the block adds, against torch; the base comes back afterwards."""
    module = emulated(checkpoint, block, adapters)
    state = embedded_sample(config=checkpoint.metadata.config)
    inputs = block_inputs(module, state)
    expected = run_by_name(module, inputs, state)
    plain = executor.run(block, inputs)
    executor.use(Selection({block: with_branches(checkpoint, block, adapters)}))
    actual = executor.run(block, inputs)
    executor.use(Selection())
    found = []
    for name, value in actual.items():
        before = inputs[name.removesuffix("_out")]
        found.append(sqnr_db(expected[name] - before, value - before))
        change = sqnr_db(value, plain[name])
        assert change < CROSSING_DB, f"the adapters are {change:.1f} dB of {name}: too little"
    for name, value in executor.run(block, inputs).items():
        assert torch.equal(value, plain[name])
    return min(found)


def with_branches(
    checkpoint: QuantizedCheckpoint, block: str, adapters: dict[str, LowRank]
) -> dict[str, LowRank]:
    """Join adapters with SVDQuant's branches, which the variant leaves to its inputs."""
    joined = branches(checkpoint, block)
    for linear, adapter in adapters.items():
        svd = joined.get(linear)
        if svd is None:
            joined[linear] = adapter
        else:
            down = torch.cat((svd.down, adapter.down), dim=1)
            joined[linear] = LowRank(down, torch.cat((svd.up, adapter.up)))
    return joined


def reference(checkpoint: QuantizedCheckpoint) -> ReferenceExecutor:
    executor = ReferenceExecutor(checkpoint.path.parent)
    executor.load(torch.device("cpu"))
    return executor


def build_lora_plans(engine_dir: Path, blocks: Sequence[str], progress: Progress) -> None:
    build_selected(engine_dir, Selection({block: {} for block in blocks}), progress)


def lora_plans(engine_dir: Path, engine: EngineManifest) -> dict[str, PlanEntry]:
    found = built_variants(engine_dir, engine)
    return {name.removesuffix(".lora"): entry for name, entry in found.items()}


@pytest.mark.parametrize("kind", [*FORMATS, "svdquant"])
def test_variants_build_with_the_formats_of_the_plain_plans(tmp_path: Path, kind: str) -> None:
    checkpoint = quantized(tmp_path, kind)
    folder = checkpoint.path.parent
    plain = build_engine(folder, SMALL_SPEC, ignore_progress)
    build_lora_plans(folder / "sm120", [DOUBLE, SINGLE], ignore_progress)
    variants = lora_plans(folder / "sm120", plain)
    by_name = {entry.block: entry for entry in plain.blocks}
    assert list(variants) == [DOUBLE, SINGLE]
    for entry in variants.values():
        twin = by_name[entry.block.removesuffix(".lora")]
        for count in ("fp4_gemms_found", "fp8_gemms_found", "fp8_mha_found"):
            assert getattr(entry, count) == getattr(twin, count)
        assert (folder / "sm120" / entry.file).stat().st_size == entry.bytes


def test_variants_are_kept_and_added_to(engine_dir: Path) -> None:
    build_lora_plans(engine_dir, [SINGLE], ignore_progress)
    engine = load_manifest(engine_dir)
    (first,) = lora_plans(engine_dir, engine).values()
    written = (engine_dir / first.file).stat().st_mtime_ns
    phases: list[str] = []
    build_lora_plans(engine_dir, [DOUBLE, SINGLE], lambda phase, done, total: phases.append(phase))
    assert list(lora_plans(engine_dir, engine)) == [DOUBLE, SINGLE]
    assert (engine_dir / first.file).stat().st_mtime_ns == written
    assert f"Built {DOUBLE}.lora" in phases
    assert f"Built {SINGLE}.lora" not in phases
    # the engine is as it was
    assert load_manifest(engine_dir) == engine
    verify_engine(engine_dir, engine, None)


def test_same_build_keeps_variants_and_another_profile_removes_them(engine_dir: Path) -> None:
    build_lora_plans(engine_dir, [SINGLE], ignore_progress)
    (entry,) = lora_plans(engine_dir, load_manifest(engine_dir)).values()
    build_engine(engine_dir.parent, SMALL_SPEC, ignore_progress)
    assert (engine_dir / entry.file).is_file()
    smaller = replace(SMALL_SPEC, profile=replace(SMALL_PROFILE, max_img_tokens=128))
    build_engine(engine_dir.parent, smaller, ignore_progress)
    assert lora_plans(engine_dir, load_manifest(engine_dir)) == {}
    assert not (engine_dir / "variants.json").exists()
    assert not (engine_dir / entry.file).exists()


def test_cancelled_build_keeps_finished_variants(engine_dir: Path) -> None:
    def cancel(phase: str, done: int, total: int) -> None:
        if phase == f"Built {DOUBLE}.lora":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_lora_plans(engine_dir, [DOUBLE, SINGLE], cancel)
    engine = load_manifest(engine_dir)
    assert list(lora_plans(engine_dir, engine)) == [DOUBLE]
    build_lora_plans(engine_dir, [DOUBLE, SINGLE], ignore_progress)
    assert list(lora_plans(engine_dir, engine)) == [DOUBLE, SINGLE]


@pytest.mark.parametrize("damage", ["gone", "truncated", "exported again", "other weights"])
def test_variant_that_no_longer_fits_is_missing_and_built_again(
    engine_dir: Path, damage: str
) -> None:
    build_lora_plans(engine_dir, [SINGLE], ignore_progress)
    engine = load_manifest(engine_dir)
    (entry,) = lora_plans(engine_dir, engine).values()
    plan = engine_dir / entry.file
    onnx = engine_dir.parent / f"{SINGLE}.lora.onnx"
    record = engine_dir / "variants.json"
    if damage == "gone":
        plan.unlink()
    elif damage == "truncated":
        plan.write_bytes(plan.read_bytes()[:-1])
    elif damage == "exported again":
        # a protobuf field of another order: same model, other bytes
        onnx.write_bytes(onnx.read_bytes() + b"\x2a\x01x")
    else:
        stored = json.loads(record.read_text())
        record.write_text(json.dumps(stored | {"checkpoint_digest": "0" * 64}))
    assert lora_plans(engine_dir, engine) == {}
    build_lora_plans(engine_dir, [SINGLE], ignore_progress)
    assert list(lora_plans(engine_dir, engine)) == [SINGLE]


def test_export_without_variants_says_to_export_again(engine_dir: Path) -> None:
    (engine_dir.parent / f"{SINGLE}.lora.onnx").unlink()
    with pytest.raises(BlocksMissingError, match=r"single_blocks\.1\.lora\.onnx"):
        build_lora_plans(engine_dir, [SINGLE], ignore_progress)
    engine = Engine.open(engine_dir, "reference")
    with pytest.raises(BlocksMissingError, match=r"single_blocks\.1\.lora\.onnx"):
        engine.use(Selection({SINGLE: {}}))


def test_variant_of_other_weights_is_refused(engine_dir: Path, tmp_path: Path) -> None:
    path = engine_dir / "manifest.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"checkpoint_digest": "0" * 64}))
    with pytest.raises(EngineStaleError, match="other weights"):
        build_lora_plans(engine_dir, [SINGLE], ignore_progress)


def test_variants_are_not_built_with_another_release(engine_dir: Path) -> None:
    path = engine_dir / "manifest.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"backend_version": "1.0"}))
    with pytest.raises(EngineVersionError, match=r"1\.0"):
        build_lora_plans(engine_dir, [SINGLE], ignore_progress)


@pytest.mark.parametrize("change", ["shape", "name", "path"])
def test_record_with_foreign_inputs_is_refused(engine_dir: Path, change: str) -> None:
    build_lora_plans(engine_dir, [SINGLE], ignore_progress)
    record = engine_dir / "variants.json"
    stored = json.loads(record.read_text())
    entry = stored["blocks"][0]
    factor = next(spec for spec in entry["inputs"] if spec["name"] == "linear1.lora_down")
    if change == "shape":
        factor["shape"] = [256, 16]
    elif change == "name":
        factor["name"] = "linear3.lora_down"
    else:
        entry["file"] = "../" + entry["file"]
    record.write_text(json.dumps(stored))
    with pytest.raises(ManifestInvalidError):
        read_manifest_file(record)
    assert lora_plans(engine_dir, load_manifest(engine_dir)) == {}


@pytest.mark.parametrize("change", ["axis", "number", "missing", "name"])
def test_variant_with_other_factors_is_refused(engine_dir: Path, change: str) -> None:
    path = engine_dir.parent / f"{SINGLE}.lora.onnx"
    model = onnx.load(path, load_external_data=False)
    factor = next(value for value in model.graph.input if value.name == "linear1.lora_down")
    if change == "axis":
        factor.type.tensor_type.shape.dim[1].dim_param = "R_linear2"
    elif change == "number":
        factor.type.tensor_type.shape.dim[1].dim_value = 16
    elif change == "missing":
        model.graph.input.remove(factor)
    else:
        factor.name = "linear1.lora_sideways"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BlockContractError):
        read_signature(path)
