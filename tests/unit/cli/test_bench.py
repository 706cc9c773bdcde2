"""The benchmark of a tiny engine on the reference backend, through the command line."""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from flux_fp4.cli.bench import BACKENDS
from flux_fp4.cli.program import main
from flux_fp4.quant.flux.config import FluxConfig
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.trt_runtime import backend
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.targets import build_spec
from PIL import Image
from quantize_tiny import quantize, with_recipe
from tiny_flux import TINY, TINY_FLUX2, ignore_progress, random_flux, random_samples, save_flux

SMALL = ("--width", "96", "--height", "64", "--text-tokens", "24", "--repetitions", "3")


def built_engine(models: Path, config: FluxConfig = TINY) -> Path:
    source = save_flux(random_flux(config), models / "source.safetensors")
    checkpoint = models / "tiny" / "tiny.safetensors"
    samples = random_samples(config)
    quantize(source, checkpoint, samples=samples, statistics=models / ".statistics")
    export_blocks(checkpoint, ignore_progress)
    build_engine(checkpoint.parent, build_spec("sm120", 1, 1, 64), ignore_progress)
    return models


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with one engine; not to be changed."""
    return built_engine(tmp_path_factory.mktemp("models"))


def bench(models: Path, *arguments: object) -> tuple[int, str, str]:
    command = ["bench", "tiny/sm120", "--models", models, *arguments]
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        code = main([str(argument) for argument in command])
    return code, output.getvalue(), errors.getvalue()


def test_every_backend_can_be_chosen() -> None:
    assert set(BACKENDS) == {"auto", backend.REFERENCE, *backend.PACKAGES}


def test_figures_of_every_kind_and_of_all_blocks(built: Path, tmp_path: Path) -> None:
    file, picture = tmp_path / "figures.json", tmp_path / "chart.png"
    code, _, errors = bench(built, *SMALL, "--warm-up", "2", "--json", file, "--chart", picture)
    assert code == 0, errors
    report = json.loads(file.read_text())
    assert (report["backend"], report["device"][:3]) == ("reference", "CPU")
    assert report["backend_reason"].startswith("no CUDA device")
    assert (report["img_tokens"], report["txt_tokens"], report["batch"]) == (24, 24, 1)
    assert {kind: entry["blocks"] for kind, entry in report["kinds"].items()} == {
        "double": 1,
        "single": 2,
    }
    for entry in report["kinds"].values():
        for spread in (entry["engine"], entry["baseline"]):
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert entry["first_seconds"] > 0
        assert entry["ratio"] == entry["baseline"]["median"] / entry["engine"]["median"]
    kinds = report["kinds"]
    medians = kinds["double"]["baseline"]["median"] + 2 * kinds["single"]["baseline"]["median"]
    assert report["baseline_step"] == pytest.approx(medians)
    assert report["ratio"] == pytest.approx(medians / report["step"]["median"])
    assert report["step"]["high"] > kinds["double"]["engine"]["low"]
    assert report["load_seconds"] > 0
    assert report["plan_bytes"] == sum(
        path.stat().st_size for path in (built / "tiny" / "sm120").glob("*.plan")
    )
    assert report["device_bytes"] is None
    assert report["bound"] is None
    with Image.open(picture) as chart:
        assert chart.size == (1000, 440)


def test_text_says_what_ran_where(built: Path) -> None:
    code, output, _ = bench(built, *SMALL, "--backend", "reference")
    assert code == 0
    for part in (
        "tiny/sm120: nvfp4-max",
        "backend reference; device CPU",
        "96x64 pixels, batch 1: 24 image and 24 text tokens; 3 passes",
        "1 double, each",
        "2 single, each",
        "bf16 PyTorch",
        "loaded in",
    ):
        assert part in output


def test_flux2_and_batches_above_the_profile(tmp_path: Path) -> None:
    built_engine(tmp_path, TINY_FLUX2)
    code, output, errors = bench(tmp_path, *SMALL, "--batch", "2")
    assert code == 0, errors
    assert "batch 2" in output


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--width", "100"), "--width cannot be used: 100 is no multiple of 16"),
        (("--repetitions", "0"), "--repetitions cannot be used: 0 is below 1"),
        (("--text-tokens", "65"), "65"),
        (("--width", "32768"), "8192"),
        (("--backend", "tensorrt"), "the plans of this engine are for 'tensorrt_rtx'"),
        (("--backend", "tensorrt_rtx"), "no CUDA device"),
    ],
)
def test_refusals_are_messages(built: Path, arguments: tuple[str, ...], fault: str) -> None:
    code, output, errors = bench(built, *SMALL, *arguments)
    assert (code, output) == (1, "")
    assert fault in errors
    assert "Traceback" not in errors


def test_figures_are_shown_even_if_their_file_cannot_be_written(
    built: Path, tmp_path: Path
) -> None:
    code, output, errors = bench(built, *SMALL, "--json", tmp_path / "absent" / "figures.json")
    assert code == 1
    assert "bf16 PyTorch" in output
    assert "figures.json" in errors


def test_stale_and_damaged_engines_are_refused(built: Path, tmp_path: Path) -> None:
    models = Path(shutil.copytree(built, tmp_path / "models"))
    plan = next((models / "tiny" / "sm120").glob("*.plan"))
    data = plan.read_bytes()
    plan.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    code, _, errors = bench(models, *SMALL)
    assert (code, "wrong digest" in errors) == (1, True)
    plan.write_bytes(data)
    quantize(
        models / "source.safetensors",
        models / "tiny" / "tiny.safetensors",
        with_recipe("nvfp4-max", headroom=2.0),
        statistics=models / ".statistics",
    )
    code, _, errors = bench(models, *SMALL)
    assert (code, "quantized again" in errors) == (1, True)


def test_gemms_need_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = {"tiny": TINY}
    monkeypatch.setattr("flux_fp4.quant.roofline.published.PUBLISHED", small)
    file = tmp_path / "gemms.json"
    command = ["bench", "--gemms", "--model", "tiny", *SMALL, "--warm-up", "1", "--json", str(file)]
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        code = main(command)
    assert code == 0, errors.getvalue()
    rows = [line for line in output.getvalue().splitlines() if line.startswith(("double", "sing"))]
    assert len(rows) == 10
    assert "24 x 256 x 768" in rows[0]
    assert "48 x 256 x 1792" in rows[8]
    assert "TFLOPS" in rows[0]
    assert "nvfp4 is not measured: " in output.getvalue()
    report = json.loads(file.read_text())
    assert report["gemms"][0]["gemm"]["outputs"] == 768
    assert report["gemms"][0]["seconds"]["bf16"]["median"] > 0
    with redirect_stderr(StringIO()) as errors:
        assert main(["bench", "--gemms", "--model", "sdxl"]) == 1
    assert "'sdxl' is none of tiny" in errors.getvalue()
