"""The executor's calls, on a fake library; a GPU is needed only for what the library then does."""

from __future__ import annotations

import gc
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_fp4.tests.unit.trt_runtime import fake_tensorrt
from flux_fp4.tests.unit.trt_runtime.block_inputs import block_inputs
from flux_fp4.tests.unit.trt_runtime.fake_tensorrt import FakeCuda, FakeLibrary
from flux_fp4.trt_runtime.backend import load_backend
from flux_fp4.trt_runtime.cuda_access import CudaAccess
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.errors.engine import PlanDigestError
from flux_fp4.trt_runtime.errors.run import EngineNotLoadedError, ExecutionError, PlanValidityError
from flux_fp4.trt_runtime.executor import TensorRTExecutor
from flux_fp4.trt_runtime.manifest import EngineManifest

CPU = torch.device("cpu")
DOUBLE, SINGLE = "double_blocks.0", "single_blocks.0"


def kinds(library: FakeLibrary, *names: str) -> list[tuple[Any, ...]]:
    return [call for call in library.calls if call[0] in names]


def test_load_prepares_the_device_then_each_block(
    executor: TensorRTExecutor, library: FakeLibrary
) -> None:
    assert not executor.loaded
    executor.load(CPU)
    user_managed = fake_tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert library.calls[0] == ("prepare", CPU, "tensorrt_rtx", ("sm120",))
    assert kinds(library, "deserialize", "context") == [
        ("deserialize", DOUBLE),
        ("context", DOUBLE, user_managed),
        ("deserialize", SINGLE),
        ("context", SINGLE, user_managed),
    ]
    assert executor.loaded
    library.calls.clear()
    executor.load(CPU)
    assert library.calls == []


def test_load_says_what_it_took_and_for_what(
    executor: TensorRTExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "flux_fp4.trt_runtime.executor"):
        executor.load(CPU)
        executor.load(CPU)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("Loaded 2 plans in ")
    parts = re.findall(r"([a-z ]+) \d+\.\d[,)]", message)
    assert [part.strip() for part in parts] == [
        "library",
        "digests",
        "deserialization",
        "contexts",
        "kernel cache",
        "rest",
    ]


def test_all_contexts_share_one_kernel_cache(
    executor: TensorRTExecutor, library: FakeLibrary
) -> None:
    executor.load(CPU)
    assert len(kinds(library, "create_runtime_cache")) == 1
    assert len({call[1] for call in kinds(library, "set_runtime_cache")}) == 1
    assert len(kinds(library, "set_runtime_cache")) == 2


def test_library_without_kernel_cache_gets_the_strategy_itself(
    engine_copy: Path, manifest: EngineManifest, library: FakeLibrary
) -> None:
    backend = library.backend(has_runtime_cache=False)
    executor = TensorRTExecutor(engine_copy, manifest, backend, FakeCuda(library.calls))
    executor.load(CPU)
    user_managed = fake_tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert {call[2] for call in kinds(library, "context")} == {user_managed}
    assert kinds(library, "create_runtime_cache") == []
    assert list(engine_copy.glob("*.cache")) == []


@pytest.mark.parametrize(("on", "expected"), [(False, "DISABLED"), (True, "WHOLE_GRAPH_CAPTURE")])
def test_cuda_graphs_are_switched_by_the_caller(
    engine_copy: Path, manifest: EngineManifest, library: FakeLibrary, on: bool, expected: str
) -> None:
    cuda = FakeCuda(library.calls)
    executor = TensorRTExecutor(engine_copy, manifest, library.backend(), cuda, cuda_graphs=on)
    executor.load(CPU)
    assert [strategy.name for strategy in library.graphs] == [expected, expected]
    assert hasattr(load_backend("tensorrt_rtx").module.CudaGraphStrategy, expected)
    assert load_backend("tensorrt_rtx").has_cuda_graphs


def test_run_sets_shapes_memory_addresses_and_executes_in_order(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest
) -> None:
    executor.load(CPU)
    library.calls.clear()
    inputs = block_inputs(manifest.blocks[0], img_tokens=40, txt_tokens=8)
    outputs = executor.run(DOUBLE, inputs)
    names = [call[0] for call in library.calls]
    assert names == ["shape"] * 16 + ["memory", "before", "execute", "after"]
    assert ("shape", DOUBLE, "img", (1, 40, 128)) in library.calls
    assert ("shape", DOUBLE, "cos", (1, 48, 32)) in library.calls
    assert library.calls[-2] == ("execute", DOUBLE, 77)
    torch.testing.assert_close(outputs["img_out"], 2 * inputs["img"])
    torch.testing.assert_close(outputs["txt_out"], 2 * inputs["txt"])


def test_same_shapes_are_not_set_again(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest
) -> None:
    executor.load(CPU)
    inputs = block_inputs(manifest.blocks[1], 40, 8)
    executor.run(SINGLE, inputs)
    library.calls.clear()
    executor.run(SINGLE, inputs)
    assert [call[0] for call in library.calls] == ["before", "execute", "after"]


def test_memory_is_shared_and_grows_to_the_actual_shapes(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest
) -> None:
    executor.load(CPU)
    double, single = manifest.blocks
    assert executor.scratch_bytes == 0
    executor.run(DOUBLE, block_inputs(double, 40, 8))
    assert executor.scratch_bytes == 48 * 1000
    executor.run(SINGLE, block_inputs(single, 40, 8))
    first, second = kinds(library, "memory")
    assert first[2:] == second[2:]
    # larger shapes move the buffer; the other context must learn of it before its next run
    executor.run(SINGLE, block_inputs(single, 200, 8))
    assert executor.scratch_bytes == 208 * 1000
    executor.run(DOUBLE, block_inputs(double, 40, 8))
    (*_, grown, moved) = kinds(library, "memory")
    assert grown[1:] == (SINGLE, *moved[2:])
    assert moved[1] == DOUBLE
    # smaller shapes keep it
    executor.run(SINGLE, block_inputs(single, 40, 8))
    assert executor.scratch_bytes == 208 * 1000


def test_inputs_become_contiguous_and_of_the_plan_s_type(
    executor: TensorRTExecutor, manifest: EngineManifest
) -> None:
    executor.load(CPU)
    inputs = block_inputs(manifest.blocks[1], 40, 8)
    x = inputs["x"].float()
    inputs["x"] = x.transpose(1, 2).contiguous().transpose(1, 2)
    outputs = executor.run(SINGLE, inputs)
    assert outputs["x_out"].dtype == torch.bfloat16
    torch.testing.assert_close(outputs["x_out"], 2 * x.bfloat16())


def test_unload_waits_saves_and_frees_everything(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest, engine_copy: Path
) -> None:
    executor.load(CPU)
    executor.run(SINGLE, block_inputs(manifest.blocks[1], 40, 8))
    assert len(library.alive) == 4
    library.cache_content = b"more kernels"
    library.calls.clear()
    executor.unload()
    gc.collect()
    assert library.calls == [("finish",)]
    assert library.alive == set()
    assert executor.scratch_bytes == 0
    assert not executor.loaded
    (cache,) = engine_copy.glob("*.cache")
    assert cache.read_bytes().endswith(b"more kernels")
    with pytest.raises(EngineNotLoadedError):
        executor.run(SINGLE, {})
    executor.load(CPU)
    assert executor.loaded


def test_kernels_are_stored_after_load_and_when_shapes_repeat(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest, engine_copy: Path
) -> None:
    executor.load(CPU)
    (cache,) = engine_copy.glob("*.cache")
    assert cache.read_bytes().endswith(b"compiled")
    library.cache_content = b"for these shapes"
    inputs = block_inputs(manifest.blocks[1], 40, 8)
    executor.run(SINGLE, inputs)
    assert cache.read_bytes().endswith(b"compiled")
    executor.run(SINGLE, inputs)
    assert cache.read_bytes().endswith(b"for these shapes")
    written = cache.stat().st_mtime_ns
    executor.run(SINGLE, inputs)
    assert cache.stat().st_mtime_ns == written


def test_alternating_shapes_do_not_store_the_kernels_every_step(
    executor: TensorRTExecutor, manifest: EngineManifest, engine_copy: Path
) -> None:
    executor.load(CPU)
    (cache,) = engine_copy.glob("*.cache")
    written = []
    for img_tokens in (40, 80, 40, 80, 40):
        cache.unlink(missing_ok=True)
        executor.run(SINGLE, block_inputs(manifest.blocks[1], img_tokens, 8))
        written.append(cache.exists())
    assert written == [False, False, True, False, False]


@pytest.mark.parametrize(
    "call",
    ["deserialize_cuda_engine", "create_execution_context", "wrong dtype"],
)
def test_failed_load_names_the_block_and_leaves_nothing(
    executor: TensorRTExecutor, library: FakeLibrary, call: str
) -> None:
    library.refused.add(call)
    library.errors.append("no kernel image")
    with pytest.raises(ExecutionError) as caught:
        executor.load(CPU)
    assert caught.value.block == DOUBLE
    if call != "wrong dtype":
        assert caught.value.messages == ("no kernel image",)
    assert not executor.loaded
    caught.value.__traceback__ = None
    del caught
    gc.collect()
    assert library.alive == set()


def test_changed_plan_is_not_deserialized(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest, engine_copy: Path
) -> None:
    (engine_copy / manifest.blocks[1].file).write_bytes(b"single_blocks.1")
    with pytest.raises(PlanDigestError):
        executor.load(CPU)
    assert kinds(library, "deserialize") == [("deserialize", DOUBLE)]
    assert not executor.loaded


def test_driver_that_is_too_old_is_named(executor: TensorRTExecutor, library: FakeLibrary) -> None:
    library.invalid = 4
    with pytest.raises(PlanValidityError, match="Update the NVIDIA driver") as caught:
        executor.load(CPU)
    assert (caught.value.block, caught.value.reasons) == (DOUBLE, ("OLD_CUDA_DRIVER",))
    assert kinds(library, "deserialize") == []
    assert not executor.loaded


def test_too_little_memory_for_a_plan_is_the_error_that_comfyui_answers(
    executor: TensorRTExecutor, library: FakeLibrary
) -> None:
    library.invalid = 16
    with pytest.raises(torch.OutOfMemoryError, match=DOUBLE):
        executor.load(CPU)


def test_validity_without_a_finding_is_not_a_refusal(
    executor: TensorRTExecutor, library: FakeLibrary
) -> None:
    library.invalid = 0
    executor.load(CPU)
    assert executor.loaded


def test_kernels_are_kept_by_driver(
    executor: TensorRTExecutor, engine_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor.load(CPU)
    executor.unload()
    (first,) = engine_copy.glob("*.cache")
    monkeypatch.setattr("flux_fp4.trt_runtime.executor.driver_version", lambda: "999.1")
    executor.load(CPU)
    assert executor.machine is not None
    assert executor.machine.driver == "999.1"
    assert len(list(engine_copy.glob("*.cache"))) == 2
    assert first.is_file()


@pytest.mark.parametrize("call", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_failed_run_names_block_and_step_and_the_next_run_starts_anew(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest, call: str
) -> None:
    executor.load(CPU)
    inputs = block_inputs(manifest.blocks[1], 40, 8)
    library.refused.add(call)
    library.errors.append("bad launch")
    with pytest.raises(ExecutionError) as caught:
        executor.run(SINGLE, inputs)
    assert caught.value.block == SINGLE
    assert call in caught.value.step
    assert caught.value.messages == ("bad launch",)
    library.refused.clear()
    executor.run(SINGLE, inputs)


def test_shapes_half_set_by_a_failed_run_are_set_again(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest
) -> None:
    executor.load(CPU)
    inputs = block_inputs(manifest.blocks[1], 40, 8)
    executor.run(SINGLE, inputs)
    library.refused.add("set_input_shape")
    with pytest.raises(ExecutionError):
        executor.run(SINGLE, block_inputs(manifest.blocks[1], 80, 8))
    library.refused.clear()
    library.calls.clear()
    executor.run(SINGLE, inputs)
    assert len(kinds(library, "shape")) == 6


def test_lack_of_gpu_memory_is_the_error_that_comfyui_answers(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest
) -> None:
    executor.load(CPU)
    library.refused.add("execute_async_v3")
    library.errors.append("Error Code 2: OutOfMemory (out of memory)")
    with pytest.raises(torch.OutOfMemoryError, match=SINGLE):
        executor.run(SINGLE, block_inputs(manifest.blocks[1], 40, 8))


def test_engine_splits_batches_above_the_profile(
    executor: TensorRTExecutor, library: FakeLibrary, manifest: EngineManifest
) -> None:
    engine = Engine(Path("tiny"), manifest, executor, "tensorrt_rtx", "")
    engine.load(CPU)
    inputs = block_inputs(manifest.blocks[1], 40, 8, batch=5)
    outputs = engine.run(SINGLE, inputs)
    shapes = [call[3][0] for call in kinds(library, "shape") if call[2] == "x"]
    assert len(kinds(library, "execute")) == 3
    assert max(shapes) <= 2
    torch.testing.assert_close(outputs["x_out"], 2 * inputs["x"])


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (fake_tensorrt.FakeRuntime, "Runtime"),
        (fake_tensorrt.FakeEngine, "ICudaEngine"),
        (fake_tensorrt.FakeConfig, "IRuntimeConfig"),
        (fake_tensorrt.FakeCache, "IRuntimeCache"),
        (fake_tensorrt.FakeContext, "IExecutionContext"),
        (fake_tensorrt.DataType, "DataType"),
        (fake_tensorrt.EngineValidity, "EngineValidity"),
        (fake_tensorrt.EngineInvalidityDiagnostics, "EngineInvalidityDiagnostics"),
        (fake_tensorrt.TensorIOMode, "TensorIOMode"),
        (fake_tensorrt.ExecutionContextAllocationStrategy, "ExecutionContextAllocationStrategy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fake_has_only_what_the_installed_library_has(fake: type, real: str) -> None:
    installed = getattr(load_backend("tensorrt_rtx").module, real)
    names = [name for name in vars(fake) if not name.startswith("_")]
    missing = [name for name in names if not hasattr(installed, name)]
    assert missing == []
    assert names


def test_fake_cuda_has_what_the_real_one_has() -> None:
    names = {name for name in vars(CudaAccess) if not name.startswith("_")}
    assert names == {name for name in vars(FakeCuda) if not name.startswith("_")} - {"stream"}


def test_installed_library_refuses_a_damaged_plan_with_its_reason(
    engine_copy: Path, manifest: EngineManifest
) -> None:
    backend = load_backend("tensorrt_rtx")
    executor = TensorRTExecutor(engine_copy, manifest, backend, FakeCuda([]))
    with pytest.raises(PlanValidityError) as caught:
        executor.load(CPU)
    assert (caught.value.block, caught.value.reasons) == (DOUBLE, ("MALFORMED_ENGINE",))
