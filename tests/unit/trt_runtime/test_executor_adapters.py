"""Adapters on the executor with a fake library: which plans are loaded, and with what factors."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from flux_fp4.tests.unit.trt_runtime.block_inputs import block_inputs
from flux_fp4.tests.unit.trt_runtime.fake_tensorrt import FakeLibrary, with_fake_plan
from flux_fp4.trt_runtime.adapters import LowRank
from flux_fp4.trt_runtime.contract import (
    LINEARS,
    LORA_DOWN,
    LORA_UP,
    TensorSpec,
    variant_name,
)
from flux_fp4.trt_runtime.errors.engine import PlanDigestError, VariantPlanMissingError
from flux_fp4.trt_runtime.errors.run import AdapterError, EngineNotLoadedError, ExecutionError
from flux_fp4.trt_runtime.executor import TensorRTExecutor
from flux_fp4.trt_runtime.manifest import (
    EngineManifest,
    PlanEntry,
    plan_file_name,
    write_manifest,
)
from flux_fp4.trt_runtime.selection import Selection
from flux_fp4.trt_runtime.spec import RANK_AXIS, RANK_TILE

CPU = torch.device("cpu")
DOUBLE, SINGLE = "double_blocks.0", "single_blocks.0"
WIDTH, OUTPUTS = 32, 48


def variant_of(entry: PlanEntry) -> PlanEntry:
    block = variant_name(entry.block, lora=True)
    inputs = list(entry.inputs)
    for linear in LINEARS[entry.kind]:
        rank = RANK_AXIS + linear
        inputs += [
            TensorSpec(linear + LORA_DOWN, "bf16", (WIDTH, rank, RANK_TILE)),
            TensorSpec(linear + LORA_UP, "bf16", (rank, RANK_TILE, OUTPUTS)),
        ]
    key = "ab" * 32
    return entry.model_copy(
        update={
            "block": block,
            "key": key,
            "file": plan_file_name(block, key),
            "inputs": tuple(inputs),
            "activation_bytes": 3 * entry.activation_bytes,
        }
    )


@pytest.fixture
def variants(
    engine_copy: Path, manifest: EngineManifest, library: FakeLibrary
) -> Sequence[PlanEntry]:
    """Plans of the variants of both blocks."""
    entries = tuple(with_fake_plan(engine_copy, variant_of(entry)) for entry in manifest.blocks)
    write_manifest(engine_copy / "variants.json", manifest.model_copy(update={"blocks": entries}))
    library.variants = entries
    return entries


def adapter(value: float = 1.0, rank: int = 4) -> LowRank:
    return LowRank(torch.full((WIDTH, rank), value), torch.ones(rank, OUTPUTS))


def result(executor: TensorRTExecutor, manifest: EngineManifest) -> torch.Tensor:
    """What a run of the single block adds to twice its input."""
    inputs = block_inputs(manifest.blocks[1], 40, 8)
    inputs["x"] = torch.zeros_like(inputs["x"])
    return executor.run(SINGLE, inputs)["x_out"]


def deserialized(library: FakeLibrary) -> list[str]:
    return [call[1] for call in library.calls if call[0] == "deserialize"]


def test_only_the_touched_block_changes_its_plan(
    executor: TensorRTExecutor, library: FakeLibrary, variants: Sequence[PlanEntry]
) -> None:
    executor.load(CPU)
    library.calls.clear()
    executor.use(Selection({SINGLE: {"linear1": adapter()}}))
    assert library.calls[0] == ("synchronize",)
    assert deserialized(library) == [f"{SINGLE}.lora"]
    gc.collect()
    assert library.alive == {
        f"{part} {block}" for part in ("engine", "context") for block in (DOUBLE, f"{SINGLE}.lora")
    }


def test_adapters_before_loading_are_loaded_at_once(
    executor: TensorRTExecutor, library: FakeLibrary, variants: Sequence[PlanEntry]
) -> None:
    executor.use(Selection({DOUBLE: {"img_mlp.0": adapter()}}))
    assert library.calls == []
    executor.load(CPU)
    assert deserialized(library) == [f"{DOUBLE}.lora", SINGLE]


def test_factors_reach_the_plan_and_go_again(
    executor: TensorRTExecutor,
    library: FakeLibrary,
    manifest: EngineManifest,
    variants: Sequence[PlanEntry],
) -> None:
    executor.load(CPU)
    assert not result(executor, manifest).any()
    executor.use(Selection({SINGLE: {"linear1": adapter(rank=4)}}))
    assert (result(executor, manifest) == WIDTH * OUTPUTS * 4).all()
    library.calls.clear()
    # another strength of the same adapter, and then another rank: the plan stays
    executor.use(Selection({SINGLE: {"linear1": adapter(0.5, rank=4)}}))
    assert (result(executor, manifest) == WIDTH * OUTPUTS * 2).all()
    executor.use(Selection({SINGLE: {"linear1": adapter(rank=40), "linear2": adapter(rank=1)}}))
    assert (result(executor, manifest) == WIDTH * OUTPUTS * 41).all()
    assert deserialized(library) == []
    executor.use(Selection())
    assert deserialized(library) == [SINGLE]
    assert not result(executor, manifest).any()


def test_steady_state_sets_no_factor_again(
    executor: TensorRTExecutor,
    library: FakeLibrary,
    manifest: EngineManifest,
    variants: Sequence[PlanEntry],
) -> None:
    executor.load(CPU)
    executor.use(Selection({SINGLE: {"linear1": adapter()}}))
    result(executor, manifest)
    library.calls.clear()
    result(executor, manifest)
    assert [call[0] for call in library.calls] == ["before", "execute", "after"]


def test_factors_survive_unloading(
    executor: TensorRTExecutor,
    library: FakeLibrary,
    manifest: EngineManifest,
    variants: Sequence[PlanEntry],
) -> None:
    executor.load(CPU)
    executor.use(Selection({SINGLE: {"linear1": adapter()}}))
    executor.unload()
    gc.collect()
    assert library.alive == set()
    executor.load(CPU)
    assert (result(executor, manifest) == WIDTH * OUTPUTS * 4).all()


def test_weights_and_activations_are_those_in_use(
    executor: TensorRTExecutor, manifest: EngineManifest, variants: Sequence[PlanEntry]
) -> None:
    double, single = manifest.blocks
    executor.use(Selection({SINGLE: {"linear1": adapter(rank=32)}}))
    # bf16; the other Linear's zeros have the smallest rank
    factors = 2 * (WIDTH + OUTPUTS) * (32 + 16)
    assert executor.weight_bytes == double.bytes + variants[1].bytes + factors
    assert executor.activation_bytes == max(double.activation_bytes, variants[1].activation_bytes)
    executor.use(Selection())
    assert executor.weight_bytes == double.bytes + single.bytes


def test_missing_variant_changes_nothing(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest
) -> None:
    executor.load(CPU)
    library.calls.clear()
    with pytest.raises(VariantPlanMissingError) as caught:
        executor.use(Selection({SINGLE: {"linear1": adapter()}}))
    assert caught.value.names == (f"{SINGLE}.lora",)
    assert library.calls == []
    assert not result(executor, manifest).any()


def test_adapter_that_does_not_fit_changes_nothing(
    executor: TensorRTExecutor,
    library: FakeLibrary,
    manifest: EngineManifest,
    variants: Sequence[PlanEntry],
) -> None:
    executor.load(CPU)
    executor.use(Selection({SINGLE: {"linear1": adapter()}}))
    library.calls.clear()
    with pytest.raises(AdapterError, match="no such Linear"):
        executor.use(Selection({SINGLE: {"linear7": adapter()}}))
    assert library.calls == []
    assert (result(executor, manifest) == WIDTH * OUTPUTS * 4).all()


def test_variant_with_other_content_is_not_deserialized(
    executor: TensorRTExecutor,
    library: FakeLibrary,
    engine_copy: Path,
    variants: Sequence[PlanEntry],
) -> None:
    executor.load(CPU)
    plan = engine_copy / variants[1].file
    plan.write_bytes(b"x" * plan.stat().st_size)
    library.calls.clear()
    with pytest.raises(PlanDigestError):
        executor.use(Selection({SINGLE: {"linear1": adapter()}}))
    assert deserialized(library) == []
    assert not executor.loaded


@pytest.mark.parametrize("call", ["deserialize_cuda_engine", "create_execution_context"])
def test_variant_that_does_not_load_leaves_nothing_loaded(
    executor: TensorRTExecutor,
    library: FakeLibrary,
    manifest: EngineManifest,
    variants: Sequence[PlanEntry],
    call: str,
) -> None:
    executor.load(CPU)
    library.refused.add(call)
    with pytest.raises(ExecutionError) as caught:
        executor.use(Selection({SINGLE: {"linear1": adapter()}}))
    assert caught.value.block == f"{SINGLE}.lora"
    with pytest.raises(EngineNotLoadedError):
        result(executor, manifest)
    caught.value.__traceback__ = None
    del caught
    gc.collect()
    assert library.alive == set()
    library.refused.clear()
    executor.load(CPU)
    assert (result(executor, manifest) == WIDTH * OUTPUTS * 4).all()
