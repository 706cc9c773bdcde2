"""The order of what is measured, on a fake library; and events in the place of a clock."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flux_fp4.tests.unit.trt_runtime.fake_tensorrt import FakeLibrary
from flux_fp4.trt_runtime import benchmark, stopwatch
from flux_fp4.trt_runtime.benchmark import CallSizes, Spread, measure_engine
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.errors.run import ExecutionError, ShapeProfileError
from flux_fp4.trt_runtime.executor import TensorRTExecutor
from flux_fp4.trt_runtime.manifest import EngineManifest
from flux_fp4.trt_runtime.stopwatch import CudaStopwatch, HostStopwatch, stopwatch_for

CPU = torch.device("cpu")
SIZES = CallSizes(batch=1, img_tokens=64, txt_tokens=16)
DOUBLE, SINGLE = "double_blocks.0", "single_blocks.0"


@pytest.fixture
def engine(engine_copy: Path, manifest: EngineManifest, executor: TensorRTExecutor) -> Engine:
    return Engine(engine_copy, manifest, executor, "tensorrt_rtx", "")


class CountingWatch:
    """The n-th mark is at n squared seconds."""

    def __init__(self) -> None:
        self.marks = 0

    def mark(self) -> int:
        self.marks += 1
        return self.marks**2

    def between(self, marks: list[int]) -> list[float]:
        return [end - start for start, end in pairwise(marks)]


def measured(engine: Engine, library: FakeLibrary, **changes: int) -> benchmark.EngineTiming:
    def baseline(kind: str) -> Any:
        return lambda inputs: library.calls.append(("baseline", kind, inputs))

    baselines = {kind: baseline(kind) for kind in ("double", "single")}
    passes = {"warm_up": 1, "repetitions": 2, **changes}
    return measure_engine(engine, SIZES, baselines, CPU, **passes, progress=lambda *_: None)


def test_passes_and_baselines_take_turns_and_the_warm_up_does_not_count(
    engine: Engine, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = CountingWatch()
    monkeypatch.setattr(benchmark, "stopwatch_for", lambda device: watch)
    timing = measured(engine, library)
    order = [call[:2] for call in library.calls if call[0] in ("execute", "baseline")]
    turn = [
        ("execute", DOUBLE),
        ("execute", SINGLE),
        ("baseline", "double"),
        ("baseline", "single"),
    ]
    assert order == 3 * turn
    # 7 marks a pass: 3 of the engine, 2 of each baseline
    double, single = timing.kinds
    assert (double.first_seconds, single.first_seconds) == (3, 5)
    assert double.engine.median == (9**2 - 8**2 + 16**2 - 15**2) / 2
    assert single.baseline.median == (14**2 - 13**2 + 21**2 - 20**2) / 2
    assert timing.step.median == (10**2 - 8**2 + 17**2 - 15**2) / 2
    assert timing.baseline_step == double.baseline.median + single.baseline.median
    assert timing.ratio == timing.baseline_step / timing.step.median
    assert timing.weight_bytes == engine.weight_bytes
    assert not engine.loaded


def test_baselines_get_the_engines_inputs_in_a_samplers_types(
    engine: Engine, library: FakeLibrary
) -> None:
    measured(engine, library)
    inputs = next(call[2] for call in library.calls if call[:2] == ("baseline", "double"))
    assert {name: tuple(inputs[name].shape[:2]) for name in ("img", "txt", "cos")} == {
        "img": (1, 64),
        "txt": (1, 16),
        "cos": (1, 80),
    }
    assert (inputs["img"].dtype, inputs["cos"].dtype) == (torch.bfloat16, torch.float32)


def test_sizes_are_checked_before_loading(engine: Engine, library: FakeLibrary) -> None:
    with pytest.raises(ShapeProfileError):
        measure_engine(engine, CallSizes(1, 10**6, 16), {}, CPU, 1, 1, lambda *_: None)
    assert library.calls == []


def test_an_engine_that_fails_is_unloaded(engine: Engine, library: FakeLibrary) -> None:
    library.refused = {"execute_async_v3"}
    with pytest.raises(ExecutionError):
        measured(engine, library)
    assert not engine.loaded
    assert library.alive == set()


def test_spread_is_the_middle_half() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_events_go_on_the_current_stream_and_only_the_last_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.number = sum(1 for call in calls if call[0] == "record")

        def record(self, stream: str) -> None:
            calls.append(("record", stream))

        def synchronize(self) -> None:
            calls.append(("synchronize", self.number))

        def elapsed_time(self, end: Event) -> float:
            assert calls[-1][0] == "synchronize"
            return 1000.0 * (end.number - self.number)

    cuda = SimpleNamespace(Event=Event, current_stream=lambda device: f"current of {device}")
    monkeypatch.setattr(stopwatch.torch, "cuda", cuda)
    watch = stopwatch_for(torch.device("cuda", 0))
    assert isinstance(watch, CudaStopwatch)
    marks = [watch.mark() for _ in range(3)]
    assert watch.between(marks) == [1.0, 1.0]
    assert calls == [*[("record", "current of cuda:0")] * 3, ("synchronize", 2)]
    assert isinstance(stopwatch_for(CPU), HostStopwatch)
