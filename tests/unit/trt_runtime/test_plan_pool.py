"""Which plans stay on the GPU, and that those which take turns compute the same."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from flux_fp4.tests.unit.trt_runtime.block_inputs import block_inputs
from flux_fp4.tests.unit.trt_runtime.fake_tensorrt import FakeLibrary
from flux_fp4.trt_runtime.errors.engine import PlanDigestError
from flux_fp4.trt_runtime.errors.run import ExecutionError
from flux_fp4.trt_runtime.executor import TensorRTExecutor
from flux_fp4.trt_runtime.manifest import EngineManifest
from flux_fp4.trt_runtime.plan_pool import bytes_within, staying_blocks
from hypothesis import given
from hypothesis import strategies as st

CPU = torch.device("cpu")
DOUBLE, SINGLE = "double_blocks.0", "single_blocks.0"
FLUX1_DEV = {f"double_blocks.{i}": 132 for i in range(19)} | {
    f"single_blocks.{i}": 66 for i in range(38)
}
"""Megabytes."""


def deserialized(library: FakeLibrary) -> list[str]:
    return [call[1] for call in library.calls if call[0] == "deserialize"]


def test_without_limit_or_within_it_all_stay() -> None:
    total = sum(FLUX1_DEV.values())
    for limit in (None, total, total + 1):
        assert staying_blocks(FLUX1_DEV, limit) == FLUX1_DEV.keys()
        assert bytes_within(FLUX1_DEV, limit) == total


def test_below_it_the_first_stay_and_one_place_is_free_for_the_others() -> None:
    staying = staying_blocks(FLUX1_DEV, 3000)
    assert bytes_within(FLUX1_DEV, 3000) == 19 * 132 + 5 * 66 + 132
    assert staying == {f"double_blocks.{i}" for i in range(19)} | {
        f"single_blocks.{i}" for i in range(5)
    }


def test_the_largest_plan_always_has_a_place() -> None:
    for limit in (-5, 0, 131):
        assert staying_blocks(FLUX1_DEV, limit) == frozenset()
        assert bytes_within(FLUX1_DEV, limit) == 132


@given(
    st.dictionaries(st.text(), st.integers(1, 200), min_size=1),
    st.integers(0, 3000),
    st.integers(0, 3000),
)
def test_a_limit_is_kept_and_more_never_takes_less(
    sizes: dict[str, int], one: int, other: int
) -> None:
    less, more = sorted((one, other))
    assert bytes_within(sizes, less) <= max(less, *sizes.values())
    assert bytes_within(sizes, more) <= sum(sizes.values())
    assert len(staying_blocks(sizes, sum(sizes.values()))) == len(sizes)
    if more - less >= max(sizes.values()):
        assert bytes_within(sizes, less) <= bytes_within(sizes, more)


def test_blocks_take_turns_and_give_the_same(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest
) -> None:
    executor.limit(0)
    executor.load(CPU)
    assert executor.loaded
    assert deserialized(library) == []
    for _step in range(2):
        for entry in manifest.blocks:
            inputs = block_inputs(entry, 40, 8)
            outputs = executor.run(entry.block, inputs)
            name = entry.inputs[0].name
            torch.testing.assert_close(outputs[f"{name}_out"], 2 * inputs[name])
            gc.collect()
            assert library.alive == {f"engine {entry.block}", f"context {entry.block}"}
    assert deserialized(library) == [DOUBLE, SINGLE] * 2


def test_the_gpu_is_waited_for_before_a_plan_goes(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest
) -> None:
    executor.limit(0)
    executor.load(CPU)
    executor.run(DOUBLE, block_inputs(manifest.blocks[0], 40, 8))
    library.calls.clear()
    executor.run(SINGLE, block_inputs(manifest.blocks[1], 40, 8))
    names = [call[0] for call in library.calls]
    assert names.index("synchronize") < names.index("deserialize")


def test_taking_turns_does_not_store_the_kernels_every_step(
    executor: TensorRTExecutor, manifest: EngineManifest, engine_copy: Path
) -> None:
    executor.limit(0)
    executor.load(CPU)
    written = []
    for _step in range(4):
        for path in engine_copy.glob("*.cache"):
            path.unlink()
        for entry in manifest.blocks:
            executor.run(entry.block, block_inputs(entry, 40, 8))
        written.append(bool(list(engine_copy.glob("*.cache"))))
    assert written == [False, True, False, False]


def test_a_limit_frees_and_brings_back_while_loaded(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest
) -> None:
    executor.load(CPU)
    sizes = [entry.bytes for entry in manifest.blocks]
    executor.limit(0)
    gc.collect()
    assert library.alive == set()
    assert executor.bytes_within(0) == max(sizes)
    executor.limit(None)
    assert len(library.alive) == 4
    assert executor.bytes_within(None) == sum(sizes)
    library.calls.clear()
    executor.limit(None)
    assert library.calls == []


def test_a_plan_that_was_replaced_meanwhile_is_not_loaded(
    executor: TensorRTExecutor, manifest: EngineManifest, engine_copy: Path
) -> None:
    executor.limit(0)
    executor.load(CPU)
    entry = manifest.blocks[0]
    (engine_copy / entry.file).write_bytes(b"x" * entry.bytes)
    with pytest.raises(PlanDigestError):
        executor.run(DOUBLE, block_inputs(entry, 40, 8))


def test_a_turn_that_fails_names_the_block_and_the_next_one_works(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest
) -> None:
    executor.limit(0)
    executor.load(CPU)
    executor.run(DOUBLE, block_inputs(manifest.blocks[0], 40, 8))
    library.refused.add("create_execution_context")
    with pytest.raises(ExecutionError, match=SINGLE):
        executor.run(SINGLE, block_inputs(manifest.blocks[1], 40, 8))
    library.refused.clear()
    executor.run(SINGLE, block_inputs(manifest.blocks[1], 40, 8))
    executor.run(DOUBLE, block_inputs(manifest.blocks[0], 40, 8))
