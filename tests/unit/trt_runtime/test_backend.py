from __future__ import annotations

import importlib
import logging
from pathlib import Path

import pytest
import torch
from flux_fp4.trt_runtime import backend as backend_module
from flux_fp4.trt_runtime.backend import (
    Backend,
    Gpu,
    choose_backend,
    load_backend,
    network_flags,
    probe_gpu,
    runtime_log,
)
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.errors.backend import (
    BackendMissingError,
    BackendUnusableError,
    EngineTargetError,
    EngineVersionError,
)

BLACKWELL = Gpu("sm120", "NVIDIA GeForce RTX 5090", "")
ADA = Gpu("sm89", "NVIDIA GeForce RTX 4090", "")
NO_GPU = Gpu("", "", "no CUDA device: no NVIDIA driver or GPU was found")
PLANS = ("tensorrt_rtx", ("sm120",))


def test_installed_library_is_probed_once() -> None:
    rtx = load_backend("tensorrt_rtx")
    assert rtx is load_backend("tensorrt_rtx")
    assert rtx.version == rtx.module.__version__
    assert rtx.chooses_targets
    assert rtx.has_runtime_cache
    assert network_flags(rtx) == 1 << int(rtx.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_missing_library_tells_package_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BackendMissingError) as caught:
        load_backend.__wrapped__("tensorrt")
    assert caught.value.package == "tensorrt>=11"
    assert "python -m pip install 'tensorrt>=11'" in str(caught.value)


def test_library_whose_native_part_does_not_load_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> None:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(BackendMissingError, match="libnvinfer"):
        load_backend.__wrapped__("tensorrt")


def test_auto_takes_the_plans_on_their_gpu() -> None:
    choice = choose_backend("auto", *PLANS, BLACKWELL)
    assert (choice.name, choice.reason) == ("tensorrt_rtx", "")
    assert choice.backend is load_backend("tensorrt_rtx")


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        (NO_GPU, "no CUDA device: no NVIDIA driver or GPU was found"),
        (ADA, "GPU is SM89, the plan targets SM120: NVIDIA GeForce RTX 4090"),
    ],
    ids=["no GPU", "older GPU"],
)
def test_auto_falls_back_to_the_reference_with_a_reason(gpu: Gpu, reason: str) -> None:
    choice = choose_backend("auto", *PLANS, gpu)
    assert (choice.backend, choice.name, choice.reason) == (None, "reference", reason)


def test_reference_can_be_asked_for() -> None:
    choice = choose_backend("reference", *PLANS, BLACKWELL)
    assert (choice.name, choice.reason) == ("reference", "")


@pytest.mark.parametrize(
    ("requested", "gpu", "kind"),
    [
        ("tensorrt_rtx", NO_GPU, BackendUnusableError),
        ("tensorrt_rtx", ADA, EngineTargetError),
        ("tensorrt", BLACKWELL, BackendUnusableError),
        ("cuda", BLACKWELL, BackendUnusableError),
    ],
)
def test_a_library_asked_for_by_name_is_never_replaced(
    requested: str, gpu: Gpu, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        choose_backend(requested, *PLANS, gpu)


def test_gpu_that_could_run_the_plans_needs_their_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> Backend:
        raise BackendMissingError(name, "tensorrt-rtx>=1.7", "not installed")

    monkeypatch.setattr(backend_module, "load_backend", missing)
    with pytest.raises(BackendMissingError):
        choose_backend("auto", *PLANS, BLACKWELL)


@pytest.mark.parametrize(
    ("cuda", "available", "device", "problem"),
    [
        (None, False, None, "a build without CUDA"),
        ("13.0", False, None, "no NVIDIA driver or GPU"),
        ("13.0", True, torch.device("cpu"), "ComfyUI runs on 'cpu'"),
    ],
    ids=["CPU build", "no driver", "--cpu"],
)
def test_unusable_cuda_is_explained(
    monkeypatch: pytest.MonkeyPatch,
    cuda: str | None,
    available: bool,
    device: torch.device | None,
    problem: str,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    gpu = probe_gpu(device)
    assert gpu.problem.startswith("no CUDA device: ")
    assert problem in gpu.problem


def test_compute_capability_becomes_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX PRO 6000")
    assert probe_gpu(torch.device("cuda", 0)) == Gpu("sm120", "RTX PRO 6000", "")


def test_library_log_goes_to_python_logging_and_keeps_errors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rtx = load_backend("tensorrt_rtx")
    log = runtime_log(rtx)
    assert log is runtime_log(rtx)
    levels = rtx.module.ILogger
    with caplog.at_level(logging.WARNING):
        log.interface.log(levels.INFO, "silent")
        log.interface.log(levels.WARNING, "careful")
        log.interface.log(levels.ERROR, "broken")
    assert [record.getMessage() for record in caplog.records] == [
        "tensorrt_rtx: careful",
        "tensorrt_rtx: broken",
    ]
    assert log.take_errors() == ["broken"]
    assert log.take_errors() == []


def test_opening_says_once_why_the_reference_runs(
    engine_copy: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flux_fp4.trt_runtime.engine.probe_gpu", lambda device: NO_GPU)
    with caplog.at_level(logging.INFO):
        engine = Engine.open(engine_copy)
    assert (engine.backend_name, engine.backend_reason) == ("reference", NO_GPU.problem)
    (record,) = [r for r in caplog.records if r.name == "flux_fp4.trt_runtime.engine"]
    assert "\n" not in record.getMessage()
    assert record.getMessage().endswith(NO_GPU.problem)


def test_usable_gpu_with_another_release_is_an_error_not_a_fallback(
    engine_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flux_fp4.trt_runtime.engine.probe_gpu", lambda device: BLACKWELL)
    assert Engine.open(engine_copy).backend_name == "tensorrt_rtx"
    manifest = engine_copy / "manifest.json"
    version = load_backend("tensorrt_rtx").version
    manifest.write_text(manifest.read_text().replace(version, "1.6.0.1"))
    with pytest.raises(EngineVersionError):
        Engine.open(engine_copy)
