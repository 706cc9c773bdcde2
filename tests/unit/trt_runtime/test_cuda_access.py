"""Device checks and stream order, on a torch whose CUDA calls are recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from flux_fp4.trt_runtime import cuda_access
from flux_fp4.trt_runtime.backend import Gpu
from flux_fp4.trt_runtime.cuda_access import CudaAccess
from flux_fp4.trt_runtime.errors.backend import BackendUnusableError, EngineTargetError

DEVICE = torch.device("cuda", 0)
Calls = list[tuple[str, ...]]


class Stream:
    """A CUDA stream that records what it waits for."""

    def __init__(self, calls: Calls, name: str) -> None:
        self.calls, self.name = calls, name
        self.cuda_stream = 77

    def wait_stream(self, other: Stream) -> None:
        self.calls.append((self.name, "waits for", other.name))

    def synchronize(self) -> None:
        self.calls.append((self.name, "is done"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls: Calls = []
    current = Stream(calls, "torch")

    @contextlib.contextmanager
    def device(device: torch.device) -> Iterator[None]:
        yield

    gpu = Gpu("sm120", "NVIDIA GeForce RTX 5090", "")
    monkeypatch.setattr(cuda_access, "probe_gpu", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(calls, "engine"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(("torch", "gives back")))
    return calls


def test_prepare_gives_cached_memory_back(calls: Calls) -> None:
    CudaAccess().prepare(DEVICE, "tensorrt_rtx", ("sm120", "sm121"))
    assert calls == [("torch", "gives back")]


def test_other_gpu_is_refused(calls: Calls) -> None:
    with pytest.raises(EngineTargetError) as caught:
        CudaAccess().prepare(DEVICE, "tensorrt_rtx", ("sm121",))
    assert (caught.value.sm, caught.value.targets) == ("sm120", ("sm121",))
    assert calls == []


def test_device_without_cuda_is_refused(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_access, "probe_gpu", lambda device: Gpu("", "", "no CUDA device: x"))
    with pytest.raises(BackendUnusableError, match="tensorrt_rtx"):
        CudaAccess().prepare(torch.device("cpu"), "tensorrt_rtx", ("sm120",))


def test_engine_runs_between_what_torch_did_and_what_it_does_next(calls: Calls) -> None:
    cuda = CudaAccess()
    cuda.prepare(DEVICE, "tensorrt_rtx", ("sm120",))
    calls.clear()
    with cuda.ordered_stream(DEVICE) as handle:
        calls.append(("engine", "runs"))
    assert handle == 77
    assert calls == [
        ("engine", "waits for", "torch"),
        ("engine", "runs"),
        ("torch", "waits for", "engine"),
    ]


def test_torch_waits_also_after_a_failed_launch(calls: Calls) -> None:
    cuda = CudaAccess()
    cuda.prepare(DEVICE, "tensorrt_rtx", ("sm120",))
    with pytest.raises(RuntimeError), cuda.ordered_stream(DEVICE):
        raise RuntimeError
    assert calls[-1] == ("torch", "waits for", "engine")


def test_finish_waits_for_the_engine(calls: Calls) -> None:
    cuda = CudaAccess()
    cuda.finish()
    cuda.prepare(DEVICE, "tensorrt_rtx", ("sm120",))
    cuda.finish()
    assert calls[-1] == ("engine", "is done")
