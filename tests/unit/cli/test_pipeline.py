"""The whole path of a small model through the command line, each command in its own process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from command_line import command, run_command
from flux_fp4.cli.program import main
from flux_fp4.quant.calibration_files import save_samples
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.trt_runtime.in_use import InUseMark
from tiny_flux import TINY, random_flux, random_samples, save_flux

BUILD = ("--target", "sm120", "--megapixels", "1", "--text-tokens", "64")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_flux(random_flux(), folder / "source.safetensors")
    save_samples(random_samples(), folder / "mine.samples.safetensors")
    return folder


def quantize(inputs: Path, models: Path, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    return run_command(
        "quantize", inputs / "source.safetensors", name, "--models", models,
        "--samples", inputs / "mine.samples.safetensors", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder after quantize, export and build; not to be changed."""
    models = tmp_path_factory.mktemp("models")
    steps = [
        quantize(inputs, models, "tiny", "--recipe", "nvfp4-max"),
        run_command("export", "tiny", "--models", models),
        run_command("build", "tiny", "--models", models, *BUILD),
    ]
    for done in steps:
        assert done.returncode == 0, done.stderr
    assert "tiny: flux1-dev, nvfp4-max" in steps[0].stdout
    assert "3 ONNX files" in steps[1].stdout
    assert "FP4 GEMMs 12 of 12" in steps[2].stdout
    assert "Building double_blocks.0" in steps[2].stderr
    return models


@pytest.fixture
def models(built: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(built, tmp_path / "models"))


def run_here(*arguments: object) -> tuple[int, str, str]:
    """Run a command in this process: without the seconds that importing torch takes."""
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        code = main([str(argument) for argument in arguments])
    return code, output.getvalue(), errors.getvalue()


def listed(models: Path) -> dict[str, Any]:
    code, output, errors = run_here("list", "--json", "--models", models)
    assert code == 0, errors
    return json.loads(output)


def engine_state(models: Path) -> str:
    return listed(models)["checkpoints"][0]["engines"][0]["state"]


def age_library(engine: Path) -> None:
    """Have an engine be that of an older TensorRT release."""
    path = engine / "manifest.json"
    manifest = json.loads(path.read_text()) | {"backend_version": "0.1"}
    path.write_text(json.dumps(manifest))


def test_list_shows_what_was_made(built: Path) -> None:
    (checkpoint,) = listed(built)["checkpoints"]
    assert checkpoint["state"] == "ready"
    assert (checkpoint["variant"], checkpoint["recipe"]) == ("flux1-dev", "nvfp4-max")
    assert checkpoint["exported"]
    (engine,) = checkpoint["engines"]
    assert (engine["name"], engine["state"], engine["plans"]) == ("tiny/sm120", "ready", 3)
    assert (engine["targets"], engine["max_img_tokens"]) == (["sm120"], 4096)
    text = run_command("list", "--models", built).stdout
    assert "tiny/sm120" in text
    assert "4096 image, 64 text tokens, batch 1" in text


def test_list_and_gc_need_neither_torch_nor_onnx(built: Path, tmp_path: Path) -> None:
    for name in ("torch", "onnx", "onnxruntime", "modelopt", "folder_paths", "comfy"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not needed')")
    for name in ("list", "gc"):
        done = run_command(name, "--models", built, PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, done.stderr


def test_how_long_it_took_is_kept_for_this_machine(built: Path) -> None:
    (file,) = (built / ".durations").iterdir()
    runs = json.loads(file.read_text())["runs"]
    counts = {work.split(",")[0]: len(found) for work, found in runs.items()}
    for stage in ("calibrate", "quantize", "build"):
        assert (counts[f"{stage} double"], counts[f"{stage} single"]) == (1, 2)
    assert counts["export of a block's graphs"] == 3
    assert counts["start of the build processes"] == 1


def test_a_second_run_finds_all_done(built: Path, inputs: Path) -> None:
    path = built / "tiny" / "tiny.safetensors"
    before = path.stat().st_mtime_ns
    assert quantize(inputs, built, "tiny").returncode == 0
    assert path.stat().st_mtime_ns == before
    done = run_command("build", "tiny", "--models", built, *BUILD)
    assert done.returncode == 0
    assert "Building" not in done.stderr


def test_verify_finds_one_changed_byte(models: Path) -> None:
    done = run_command("verify", "tiny/sm120", "--models", models)
    assert (done.returncode, done.stdout) == (
        0,
        "tiny/sm120: 3 plans checked, all as recorded\n",
    )
    plan = sorted((models / "tiny" / "sm120").glob("*.plan"))[0]
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    done = run_command("verify", "tiny/sm120", "--models", models)
    assert done.returncode == 1
    assert "wrong digest" in done.stderr
    assert "(1 faults" not in done.stdout
    assert "1 faults" in done.stdout


def test_stale_states_are_listed_and_collected(models: Path, inputs: Path) -> None:
    assert run_here("gc", "--models", models) == (0, "Nothing to delete.\n", "")
    assert quantize(inputs, models, "tiny", "--bf16-attention").returncode == 0
    assert engine_state(models) == "quantized again after the build"
    shown = run_command("gc", "--models", models).stdout
    assert "quantized again after the build" in shown
    assert "nothing was deleted" in shown
    assert (models / "tiny" / "sm120" / "manifest.json").is_file()
    done = run_command("gc", "--models", models, "--delete")
    assert done.returncode == 0
    assert "MB were deleted" in done.stdout
    assert not (models / "tiny" / "sm120").exists()
    QuantizedCheckpoint.read(models / "tiny" / "tiny.safetensors")


def test_damage_is_listed(models: Path) -> None:
    engine = models / "tiny" / "sm120"
    plan = sorted(engine.glob("*.plan"))[0]
    plan.write_bytes(b"short")
    assert engine_state(models).startswith("plan damaged")
    plan.unlink()
    assert engine_state(models).startswith("plan missing")
    (engine / "manifest.json").rename(engine / "build.json")
    assert engine_state(models) == "unfinished build: 2 plans"
    (models / "tiny" / "tiny.safetensors").write_bytes(b"x" * 100)
    (checkpoint,) = listed(models)["checkpoints"]
    assert checkpoint["state"].startswith("refused: it cannot be read")


def test_a_quota_deletes_engines_only(models: Path) -> None:
    done = run_command("gc", "--models", models, "--quota", "0", "--delete")
    assert done.returncode == 0
    assert not (models / "tiny" / "sm120").exists()
    assert (models / "tiny" / "tiny.safetensors").is_file()
    assert list((models / "tiny").glob("*.onnx"))


@pytest.mark.skipif(sys.platform == "win32", reason="Requires: POSIX signals")
def test_ctrl_c_keeps_finished_blocks(inputs: Path, tmp_path: Path) -> None:
    arguments = command(
        "quantize", inputs / "source.safetensors", "tiny", "--models", tmp_path,
        "--samples", inputs / "mine.samples.safetensors",
    )  # fmt: skip
    with subprocess.Popen(
        arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            # the first block that is quantized is over when the second one is told
            if "single_blocks.0" in line and "uantiz" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "Finished blocks are kept" in rest
    assert (tmp_path / "tiny" / ".tiny.partial").is_file()
    assert not (tmp_path / "tiny" / "tiny.safetensors").exists()
    unfinished = listed(tmp_path)["unfinished"]
    assert unfinished == [str(tmp_path / "tiny" / ".tiny.partial")]
    assert quantize(inputs, tmp_path, "tiny").returncode == 0
    assert listed(tmp_path)["unfinished"] == []


def test_statistics_go_with_their_last_checkpoint(models: Path) -> None:
    (folder,) = (models / ".statistics").iterdir()
    shutil.rmtree(models / "tiny")
    assert "Nothing" in run_here("gc", "--models", models)[1]
    old = time.time() - 2 * 86400
    for path in folder.iterdir():
        os.utime(path, (old, old))
    assert "no checkpoint here was made with it" in run_here("gc", "--models", models)[1]
    assert run_here("gc", "--models", models, "--delete")[0] == 0
    assert not folder.exists()


REFUSED = {
    "absent source": ("quantize", "absent.safetensors", "a"),
    "path as destination": ("quantize", "source.safetensors", "../a"),
    "absolute destination": ("quantize", "source.safetensors", "/tmp/a"),
    "hidden destination": ("quantize", "source.safetensors", ".statistics"),
    "unknown recipe": ("quantize", "source.safetensors", "a", "--recipe", "../../etc/passwd"),
    "headroom": ("quantize", "source.safetensors", "a", "--headroom", "99"),
    "floor without auto": ("quantize", "source.safetensors", "a", "--quality-floor", "3"),
    "path as checkpoint": ("export", "../tiny"),
    "absent checkpoint": ("build", "absent"),
    "not exported": ("build", "raw"),
    "path as engine": ("verify", "tiny/../tiny/sm120"),
    "engine without target": ("verify", "tiny"),
    "quota": ("gc", "--quota", "nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_messages(
    built: Path, inputs: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    models = tmp_path / "models"
    (models / "raw").mkdir(parents=True)
    shutil.copy(built / "tiny" / "tiny.safetensors", models / "raw" / "raw.safetensors")
    arguments = list(REFUSED[case])
    if arguments[0] == "quantize":
        arguments += ["--samples", "mine.samples.safetensors"]
    code, output, errors = run_here(*arguments, "--models", models)
    assert (code, output) == (1, "")
    assert errors.strip()
    assert "Traceback" not in errors
    assert [path.name for path in models.iterdir()] == ["raw"]
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_samples_are_checked_before_anything_is_written(inputs: Path, tmp_path: Path) -> None:
    done = run_command(
        "quantize", inputs / "source.safetensors", "a", "--models", tmp_path,
        "--samples", inputs / "source.safetensors",
    )  # fmt: skip
    assert done.returncode == 1
    assert "holds no usable calibration samples" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_own_recipes_are_found(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    recipe = "name: mine\nsummary: Of my own.\nlinears: fp8\n"
    (tmp_path / "recipes" / "mine.yaml").write_text(recipe)
    done = quantize(inputs, tmp_path, "tiny", "--recipe", "mine")
    assert done.returncode == 0, done.stderr
    assert f"{TINY.depth * 8 + TINY.depth_single_blocks * 2} in FP8" in done.stdout


def test_an_engine_of_another_release_is_built_again(models: Path) -> None:
    engine = models / "tiny" / "sm120"
    before = {path.name: path.read_bytes() for path in engine.glob("*.plan")}
    age_library(engine)
    assert engine_state(models).startswith("library updated: built with tensorrt_rtx 0.1")
    for onnx in (models / "tiny").glob("*.onnx"):
        onnx.unlink()
    done = run_command("rebuild", "--models", models)
    assert (done.returncode, done.stdout.count("tiny/sm120 was built again")) == (0, 1), done.stderr
    assert engine_state(models) == "ready"
    manifest = json.loads((engine / "manifest.json").read_text())
    # for what it was built for before, and not for the defaults
    assert manifest["profile"]["max_txt_tokens"] == 64
    assert {path.name for path in engine.glob("*.plan")} == set(before)
    assert run_here("rebuild", "--models", models)[1] == "Every engine is up to date.\n"


def test_an_engine_that_cannot_be_rebuilt_says_why(models: Path) -> None:
    (models / "tiny" / "sm120" / "manifest.json").write_text("{}")
    code, output, errors = run_here("rebuild", "tiny/sm120", "--models", models)
    assert (code, output) == (1, "")
    assert "tiny/sm120 was not built: manifest refused" in errors


def test_gc_leaves_an_engine_that_another_process_has_open(models: Path) -> None:
    engine = models / "tiny" / "sm120"
    mark = InUseMark(engine)
    (checkpoint,) = listed(models)["checkpoints"]
    assert checkpoint["engines"][0]["in_use"]
    done = run_command("gc", "--models", models, "--quota", "0", "--delete")
    assert (done.returncode, done.stdout) == (0, "Nothing to delete.\n0.0 MB were deleted\n")
    mark.release()
    assert run_command("gc", "--models", models, "--quota", "0", "--delete").returncode == 0
    assert not engine.exists()


def test_verify_reads_the_tensors_of_a_checkpoint(models: Path) -> None:
    code, output, _ = run_here("verify", "tiny", "--models", models)
    assert (code, output) == (0, "tiny: all tensors as recorded\n")
    path = models / "tiny" / "tiny.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, output, errors = run_here("verify", "tiny", "--models", models)
    assert (code, output) == (1, "")
    assert "wrong digest" in errors


def test_several_models_folders_are_one(models: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.mkdir()
    code, output, errors = run_here("list", "--json", "--models", first, "--models", models)
    assert code == 0, errors
    assert [entry["name"] for entry in json.loads(output)["checkpoints"]] == ["tiny"]
    age_library(models / "tiny" / "sm120")
    _, shown, _ = run_here("gc", "--models", first, "--models", models)
    assert "library updated" in shown
