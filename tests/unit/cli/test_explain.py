"""`bench --explain`, and what a measurement on a GPU says beside it."""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flux_fp4.cli.bench_bounds import MeasuredBound, measured_bound
from flux_fp4.cli.program import main
from flux_fp4.quant.recipe import QuantizeOptions
from flux_fp4.quant.roofline.subjects import published_subject
from flux_fp4.quant.roofline.work import StepSizes
from flux_fp4.trt_runtime.benchmark import EngineTiming, KindTiming, Spread
from PIL import Image

GPU = ("--gpu", "GeForce RTX 5090")


def explain(*arguments: object) -> tuple[int, str, str]:
    command = ["bench", "--explain", *arguments]
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        code = main([str(argument) for argument in command])
    return code, output.getvalue(), errors.getvalue()


def least(output: str) -> float:
    """Return the least milliseconds of a step."""
    return float(output.split("at least ")[1].split(" ms")[0])


def test_a_model_is_explained_without_an_engine(tmp_path: Path) -> None:
    code, output, errors = explain(*GPU, "--chart", tmp_path / "chart.png")
    assert (code, errors) == (0, "")
    first = output.splitlines()[0]
    assert first.startswith("flux1-dev, nvfp4-max, attention in FP8 on GeForce RTX 5090: at least")
    for part in ("Linears, NVFP4", "attention, FP8", "tensor cores", "GiB of 32", "Peaks: https"):
        assert part in output
    with Image.open(tmp_path / "chart.png") as chart:
        assert chart.width == 1000


def test_choices_change_the_bound() -> None:
    _, plain, _ = explain(*GPU)
    for arguments in (
        ("--bf16-attention",),
        ("--lora-rank", 64),
        ("--recipe", "fp8"),
        ("--width", 2048),
        ("--steps", 4),
    ):
        code, output, errors = explain(*GPU, *arguments)
        assert code == 0, errors
        assert least(output) > least(plain), arguments
    _, output, _ = explain(*GPU, "--recipe", "nvfp4-svdquant-r64", "--lora-rank", 16)
    assert "'lora: baked' in 'Load FLUX FP4 Engine': saves" in output
    _, output, _ = explain("--gpu", "GeForce RTX 5060", "--model", "flux2-dev")
    assert "plans take turns" in output


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--gpu", "GeForce RTX 3090"), "The peaks of 'GeForce RTX 3090' are not known"),
        (("--gpu", "GeForce RTX 4090"), "GeForce RTX 4090 has no tensor cores for NVFP4"),
        ((*GPU, "--steps", 0), "--steps cannot be used: 0 is below 1"),
        ((*GPU, "--lora-rank", 600), "--lora-rank cannot be used: 600 is not from 0 to 512"),
        ((*GPU, "--recipe", "mine"), "Recipe 'mine' cannot be used"),
        ((*GPU, "--model", "sdxl"), "--model cannot be used: 'sdxl' is none of flux1-dev, "),
        ((*GPU, "--recipe", "auto"), "ask for a checkpoint that it has made"),
        ((*GPU, "--width", 1000), "1000 is no multiple of 16"),
    ],
)
def test_refusals_are_messages(arguments: tuple[object, ...], fault: str) -> None:
    code, output, errors = explain(*arguments)
    assert (code, output) == (1, "")
    assert fault in errors


def test_without_a_gpu_one_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, errors = explain()
    assert (code, "--gpu cannot be used: there is no CUDA GPU here" in errors) == (1, True)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A machine with an RTX 5080, for those who only ask what it is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA GeForce RTX 5080")
    properties = SimpleNamespace(total_memory=16 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _=None: properties)
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda _=None: 2700)
    return torch.device("cuda", 0)


def test_the_gpu_of_this_machine_is_found(on_gpu: torch.device) -> None:
    del on_gpu
    code, output, errors = explain()
    assert code == 0, errors
    assert "on GeForce RTX 5080" in output


def timing(double: float, single: float) -> EngineTiming:
    kinds = tuple(
        KindTiming(kind, blocks, 1.0, Spread(s, 0.9 * s, 1.2 * s), Spread(3 * s, 3 * s, 3 * s))
        for kind, blocks, s in (("double", 19, double), ("single", 38, single))
    )
    step = 19 * double + 38 * single
    return EngineTiming(2.0, kinds, Spread(step, step, step), 3 * step, 5 << 30, None)


def found_bound(device: torch.device, fp8_attention: bool = True) -> MeasuredBound:
    subject = published_subject("flux1-dev", QuantizeOptions(fp8_attention=fp8_attention))
    found = measured_bound(subject.running(), StepSizes(1, 4096, 512), device)
    assert found is not None
    return found


def test_the_kind_that_is_furthest_is_named(on_gpu: torch.device) -> None:
    found = found_bound(on_gpu, fp8_attention=False)
    measured = timing(2 * found.kinds["double"], 4 * found.kinds["single"])
    assert found.reached(measured) == {"double": 0.5, "single": 0.25}
    lines = "\n".join(found.lines(measured))
    assert "single blocks: at least" in lines
    assert "25% of that speed reached" in lines
    assert "furthest from the bound: single blocks" in lines
    assert "2700 MHz" in lines
    assert "FP8 attention in 'Quantize FLUX to FP4': lowers the bound" in lines
    figures = found.figures(measured)
    assert figures["reached"] == {"double": 0.5, "single": 0.25}
    assert figures["gpu"] == "GeForce RTX 5080"


def test_other_devices_have_no_bound(
    on_gpu: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subject, sizes = published_subject("flux1-dev", QuantizeOptions()), StepSizes(1, 64, 16)
    assert measured_bound(subject, sizes, torch.device("cpu")) is None
    for name in ("NVIDIA GeForce RTX 5080 Laptop GPU", "NVIDIA GeForce RTX 4080"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None, name=name: name)
        assert measured_bound(subject, sizes, on_gpu) is None
        assert "No bound is shown." in capsys.readouterr().out
