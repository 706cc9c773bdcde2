"""Baked blocks on the executor with a fake library: which plans are loaded, and from where."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import pytest
import torch
from flux_fp4.tests.unit.trt_runtime.block_inputs import block_inputs
from flux_fp4.tests.unit.trt_runtime.fake_tensorrt import FakeLibrary, with_fake_plan
from flux_fp4.trt_runtime.digest import digest_of_bytes
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.errors.engine import PlanDigestError, VariantPlanMissingError
from flux_fp4.trt_runtime.executor import TensorRTExecutor
from flux_fp4.trt_runtime.manifest import (
    EngineManifest,
    PlanEntry,
    plan_file_name,
    write_manifest,
)
from flux_fp4.trt_runtime.selection import BakedBlocks, Selection
from flux_fp4.trt_runtime.self_test import Machine

CPU = torch.device("cpu")
DOUBLE, SINGLE = "double_blocks.0", "single_blocks.0"


def plans_of(
    engine_dir: Path, manifest: EngineManifest, name: str, *blocks: str
) -> tuple[BakedBlocks, list[PlanEntry]]:
    """Store plans of changed blocks, and what says which they are."""
    baked = BakedBlocks(engine_dir.parent / "baked" / name, blocks)
    plan_dir = baked.plan_dir(engine_dir)
    plan_dir.mkdir(parents=True)
    entries = []
    for entry in manifest.blocks:
        if entry.block in blocks:
            shutil.copy(engine_dir.parent / f"{entry.block}.onnx", baked.folder)
            key = digest_of_bytes(f"{name} {entry.block}".encode())
            file = plan_file_name(entry.block, key)
            changed = entry.model_copy(update={"key": key, "file": file})
            entries.append(with_fake_plan(plan_dir, changed, name))
    write_manifest(plan_dir / "baked.json", manifest.model_copy(update={"blocks": tuple(entries)}))
    return baked, entries


def deserialized(library: FakeLibrary) -> list[str]:
    return [call[1] for call in library.calls if call[0] == "deserialize"]


def test_only_changed_blocks_change_their_plans(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest, engine_copy: Path
) -> None:
    first, _ = plans_of(engine_copy, manifest, "first", SINGLE)
    second, _ = plans_of(engine_copy, manifest, "second", DOUBLE, SINGLE)
    executor.load(CPU)
    library.calls.clear()
    executor.use(Selection(baked=first))
    assert library.calls[0] == ("synchronize",)
    assert deserialized(library) == [f"{SINGLE} first"]
    executor.use(Selection(baked=first))
    assert deserialized(library) == [f"{SINGLE} first"]
    executor.use(Selection(baked=second))
    assert deserialized(library)[1:] == [f"{DOUBLE} second", f"{SINGLE} second"]
    executor.use(Selection())
    assert deserialized(library)[3:] == [DOUBLE, SINGLE]


def test_baked_blocks_survive_unloading(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest, engine_copy: Path
) -> None:
    baked, (entry,) = plans_of(engine_copy, manifest, "lora", SINGLE)
    executor.use(Selection(baked=baked))
    assert library.calls == []
    assert executor.weight_bytes == manifest.blocks[0].bytes + entry.bytes
    for _ in range(2):
        executor.load(CPU)
        assert deserialized(library) == [DOUBLE, f"{SINGLE} lora"]
        executor.unload()
        gc.collect()
        assert library.alive == set()
        library.calls.clear()


def test_baked_blocks_take_turns_within_a_limit(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest, engine_copy: Path
) -> None:
    baked, entries = plans_of(engine_copy, manifest, "lora", DOUBLE, SINGLE)
    executor.limit(0)
    executor.use(Selection(baked=baked))
    executor.load(CPU)
    assert executor.bytes_within(0) == max(entry.bytes for entry in entries)
    for _ in range(2):
        library.calls.clear()
        for entry in manifest.blocks:
            executor.run(entry.block, block_inputs(entry, 40, 8))
        assert deserialized(library) == [f"{DOUBLE} lora", f"{SINGLE} lora"]
    executor.use(Selection())
    executor.run(SINGLE, block_inputs(manifest.blocks[1], 40, 8))
    assert deserialized(library)[-1] == SINGLE


def test_missing_plan_changes_nothing(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest, engine_copy: Path
) -> None:
    baked, _ = plans_of(engine_copy, manifest, "lora", SINGLE)
    both = BakedBlocks(baked.folder, (DOUBLE, SINGLE))
    executor.load(CPU)
    executor.use(Selection(baked=baked))
    library.calls.clear()
    with pytest.raises(VariantPlanMissingError) as caught:
        executor.use(Selection(baked=both))
    assert caught.value.names == (DOUBLE,)
    assert library.calls == []
    assert executor.weight_bytes == manifest.blocks[0].bytes + len(f"{SINGLE} lora")


def test_plan_with_other_content_is_not_deserialized(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest, engine_copy: Path
) -> None:
    baked, (entry,) = plans_of(engine_copy, manifest, "lora", SINGLE)
    executor.load(CPU)
    plan = baked.plan_dir(engine_copy) / entry.file
    plan.write_bytes(b"x" * plan.stat().st_size)
    library.calls.clear()
    with pytest.raises(PlanDigestError):
        executor.use(Selection(baked=baked))
    assert deserialized(library) == []
    assert not executor.loaded


class WatchingSelfTest:
    """Notes which plans are there when the engine is tested for the first time."""

    def __init__(self, library: FakeLibrary) -> None:
        self.library = library
        self.seen: list[str] = []

    def has_passed(self, machine: Machine) -> bool:
        return False

    def run(self, machine: Machine, run_block: object) -> None:
        self.seen = deserialized(self.library)
        self.library.calls.clear()


def test_self_test_runs_the_engines_own_blocks(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest, engine_copy: Path
) -> None:
    baked, _ = plans_of(engine_copy, manifest, "lora", SINGLE)
    test = WatchingSelfTest(library)
    engine = Engine(engine_copy, manifest, executor, "fake", "", test)  # type: ignore[arg-type]
    engine.use(Selection(baked=baked))
    engine.load(CPU)
    assert test.seen[-1] == SINGLE
    assert deserialized(library) == [f"{SINGLE} lora"]
