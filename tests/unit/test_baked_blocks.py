"""Changed blocks from quant/ in the place of an engine's own: real plans, and the reference."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from block_inputs import block_inputs, embedded_sample
from flux_fp4.quant.changed_blocks import quantize_changed_blocks
from flux_fp4.quant.emulation import emulated_block
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.sources.source import open_source
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_PROFILE, SMALL_SPEC
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.errors.backend import EngineVersionError
from flux_fp4.trt_runtime.errors.blocks import BlocksMissingError
from flux_fp4.trt_runtime.errors.engine import EngineStaleError
from flux_fp4.trt_runtime.errors.run import BlockInputError
from flux_fp4.trt_runtime.manifest import PlanEntry, load_manifest, verify_engine
from flux_fp4.trt_runtime.progress import Progress
from flux_fp4.trt_runtime.reference import ReferenceExecutor
from flux_fp4.trt_runtime.selection import BakedBlocks, Selection
from flux_fp4.trt_runtime.variant_plans import build_selected, selected_plans
from merged_source import MergedSource, random_changes
from quantize_tiny import quantize
from stored_block import high_precision_block, run_by_name
from tiny_flux import ignore_progress, random_flux, save_flux
from torch import Tensor

DOUBLE, SINGLE = "double_blocks.0", "single_blocks.1"
CHANGED = (f"{DOUBLE}.img_attn.qkv", f"{SINGLE}.linear1")
EXACT_DB = 30.0
"""fp32 sums in another order: 80 dB and more, unless a value crosses an FP4 rounding edge."""


def bake(base: QuantizedCheckpoint, folder: Path, seed: int) -> BakedBlocks:
    """Change two blocks at random, and export them."""
    source = open_source(base.path.parent.parent / "source.safetensors")
    changes = random_changes(source, *CHANGED, seed=seed)
    quantize_changed_blocks(
        MergedSource(source, changes, f"{seed}"),
        base,
        (DOUBLE, SINGLE),
        folder / "blocks.safetensors",
        base.path.parent.parent / "statistics",
        ignore_progress,
        dtype=torch.float32,
    )
    export_blocks(folder / "blocks.safetensors", ignore_progress)
    return BakedBlocks(folder, (DOUBLE, SINGLE))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished engine and two bakes of it, one of them with plans; not to be changed."""
    root = tmp_path_factory.mktemp("model")
    source = save_flux(random_flux(), root / "source.safetensors")
    path = root / "tiny" / "tiny.safetensors"
    checkpoint = quantize(source, path, statistics=root / "statistics")
    export_blocks(path, ignore_progress)
    build_engine(path.parent, SMALL_SPEC, ignore_progress)
    first = bake(checkpoint, path.parent / "baked" / "first", seed=1)
    bake(checkpoint, path.parent / "baked" / "second", seed=2)
    build_baked_plans(path.parent / SMALL_SPEC.folder_name, first, ignore_progress)
    return path.parent / SMALL_SPEC.folder_name


@pytest.fixture
def engine_dir(built: Path, tmp_path: Path) -> Path:
    """A finished engine that the test may change."""
    shutil.copytree(built.parent, tmp_path / "tiny")
    return tmp_path / "tiny" / built.name


def baked_in(engine_dir: Path, name: str = "first") -> BakedBlocks:
    return BakedBlocks(engine_dir.parent / "baked" / name, (DOUBLE, SINGLE))


def build_baked_plans(engine_dir: Path, baked: BakedBlocks, progress: Progress) -> None:
    build_selected(engine_dir, Selection(baked=baked), progress)


def baked_plans(engine_dir: Path, baked: BakedBlocks) -> dict[str, PlanEntry]:
    found = selected_plans(engine_dir, load_manifest(engine_dir), Selection(baked=baked))
    return {block: found[block].entry for block in baked.blocks if block in found}


def usable(engine_dir: Path, name: str = "first") -> list[str]:
    return list(baked_plans(engine_dir, baked_in(engine_dir, name)))


def test_plans_are_built_as_the_engines_own(built: Path) -> None:
    engine = load_manifest(built)
    own = {entry.block: entry for entry in engine.blocks}
    found = baked_plans(built, baked_in(built))
    assert list(found) == [DOUBLE, SINGLE]
    for block, entry in found.items():
        for field in ("fp4_gemms_found", "fp8_mha_found", "inputs", "outputs"):
            assert getattr(entry, field) == getattr(own[block], field)
        # the costs per step are the plan's: as many bytes, but for a few
        assert entry.bytes == pytest.approx(own[block].bytes, rel=0.01)
        assert entry.digest != own[block].digest
    verify_engine(built, engine, None)


def test_plans_are_kept(engine_dir: Path) -> None:
    plans = baked_in(engine_dir).plan_dir(engine_dir)
    written = {path: path.stat().st_mtime_ns for path in plans.glob("*.plan")}
    assert len(written) == 2
    phases: list[str] = []
    build_baked_plans(
        engine_dir, baked_in(engine_dir), lambda phase, done, total: phases.append(phase)
    )
    assert not [phase for phase in phases if phase.startswith("Built")]
    assert {path: path.stat().st_mtime_ns for path in plans.glob("*.plan")} == written


def test_cancelled_build_is_not_used_and_goes_on(engine_dir: Path) -> None:
    baked = baked_in(engine_dir, "second")

    def cancel(phase: str, done: int, total: int) -> None:
        if phase == f"Built {DOUBLE}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_baked_plans(engine_dir, baked, cancel)
    assert usable(engine_dir, "second") == [DOUBLE]
    phases: list[str] = []
    build_baked_plans(engine_dir, baked, lambda phase, done, total: phases.append(phase))
    assert [phase for phase in phases if phase.startswith("Built")] == [f"Built {SINGLE}"]
    assert usable(engine_dir, "second") == [DOUBLE, SINGLE]


@pytest.mark.parametrize("field", ["checkpoint_digest", "backend_version", "profile", "targets"])
def test_plans_of_another_engine_are_refused_and_built_again(engine_dir: Path, field: str) -> None:
    record = baked_in(engine_dir).plan_dir(engine_dir) / "baked.json"
    stored = json.loads(record.read_text())
    others = {
        "checkpoint_digest": "0" * 64,
        "backend_version": "1.0",
        "profile": {**stored["profile"], "max_img_tokens": 999},
        "targets": ["sm121"],
    }
    record.write_text(json.dumps(stored | {field: others[field]}))
    assert usable(engine_dir) == []
    build_baked_plans(engine_dir, baked_in(engine_dir), ignore_progress)
    assert usable(engine_dir) == [DOUBLE, SINGLE]


def test_plans_of_another_change_are_refused(engine_dir: Path) -> None:
    """Both were made for this engine, and their ONNX files point to the same bytes."""
    first, second = baked_in(engine_dir), baked_in(engine_dir, "second")
    shutil.copytree(first.plan_dir(engine_dir), second.plan_dir(engine_dir))
    assert usable(engine_dir, "second") == []


@pytest.mark.parametrize("damage", ["gone", "truncated", "record"])
def test_damaged_plans_are_refused_and_built_again(engine_dir: Path, damage: str) -> None:
    plans = baked_in(engine_dir).plan_dir(engine_dir)
    (plan,) = plans.glob(f"{SINGLE}-*.plan")
    if damage == "gone":
        plan.unlink()
    elif damage == "truncated":
        plan.write_bytes(plan.read_bytes()[:-1])
    else:
        (plans / "baked.json").write_text("{")
    assert SINGLE not in usable(engine_dir)
    build_baked_plans(engine_dir, baked_in(engine_dir), ignore_progress)
    assert usable(engine_dir) == [DOUBLE, SINGLE]


def test_engine_built_again_takes_no_plans_of_the_old_one(engine_dir: Path) -> None:
    spec = replace(SMALL_SPEC, profile=replace(SMALL_PROFILE, max_img_tokens=128))
    build_engine(engine_dir.parent, spec, ignore_progress)
    assert usable(engine_dir) == []


def test_other_release_builds_nothing(engine_dir: Path) -> None:
    path = engine_dir / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"backend_version": "1.0"}))
    with pytest.raises(EngineVersionError, match=r"1\.0"):
        build_baked_plans(engine_dir, baked_in(engine_dir), ignore_progress)


def outputs(
    executor: ReferenceExecutor, block: str, checkpoint: QuantizedCheckpoint
) -> dict[str, Tensor]:
    state = embedded_sample(config=checkpoint.metadata.config)
    return executor.run(block, block_inputs(high_precision_block(checkpoint, block), state))


def test_reference_runs_the_changed_blocks_and_the_base_again(built: Path) -> None:
    executor = ReferenceExecutor(built.parent)
    executor.load(torch.device("cpu"))
    base = QuantizedCheckpoint.read(built.parent / "tiny.safetensors")
    blocks = base.metadata.config.block_names
    before = {block: outputs(executor, block, base) for block in blocks}
    bytes_before = executor.weight_bytes
    executor.use(Selection(baked=baked_in(built)))
    # as many packed bytes run as before
    assert executor.weight_bytes == bytes_before
    for block in blocks:
        found = outputs(executor, block, base)
        for name, value in found.items():
            if block not in (DOUBLE, SINGLE):
                assert torch.equal(value, before[block][name])
                continue
            change = sqnr_db(value, before[block][name])
            assert change < EXACT_DB, f"{block}: the change is {change:.1f} dB of {name}"
            db = sqnr_db(emulated(base, baked_in(built), block)[name], value)
            assert db > EXACT_DB, f"{block}: {db:.1f} dB"
    executor.use(Selection())
    for block in blocks:
        for name, value in outputs(executor, block, base).items():
            assert torch.equal(value, before[block][name])


def emulated(base: QuantizedCheckpoint, baked: BakedBlocks, block: str) -> dict[str, Tensor]:
    """The changed block in torch."""
    tensors = QuantizedCheckpoint.read(baked.folder / "blocks.safetensors").block_tensors(block)
    stored = high_precision_block(base, block)
    state = embedded_sample(config=base.metadata.config)
    module = emulated_block(stored, tensors)
    return run_by_name(module, block_inputs(stored, state), state)


def test_reference_refuses_what_is_not_the_engines(engine_dir: Path) -> None:
    engine = Engine.open(engine_dir, "reference")
    baked = baked_in(engine_dir)
    with pytest.raises(BlockInputError, match=r"double_blocks\.7"):
        engine.use(Selection(baked=BakedBlocks(baked.folder, ("double_blocks.7",))))
    (baked.folder / f"{SINGLE}.onnx").unlink()
    with pytest.raises(BlocksMissingError, match=r"single_blocks\.1\.onnx"):
        engine.use(Selection(baked=baked))
    # a block of another checkpoint
    other = engine_dir.parent / "baked" / "second"
    onnx = other / f"{DOUBLE}.onnx"
    digest = load_manifest(engine_dir).checkpoint_digest.encode()
    onnx.write_bytes(onnx.read_bytes().replace(digest, b"0" * 64))
    with pytest.raises(EngineStaleError, match="other weights"):
        engine.use(Selection(baked=baked_in(engine_dir, "second")))
