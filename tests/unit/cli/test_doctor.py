"""The report for bugs: complete, parseable, without secrets, and never stopped by what it meets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import run_command
from flux_fp4.cli import native_probes
from flux_fp4.cli.doctor import probed
from flux_fp4.cli.native_probes import NativeProbe
from pack_import import ROOT

SECTIONS = {
    "pack", "system", "memory_bytes", "driver", "packages", "disk", "models", "machines",
    "leftovers", "durations", "torch", "tensorrt_rtx", "tensorrt",
}  # fmt: skip


def report(models: Path, **environment: str) -> dict[str, Any]:
    done = run_command("doctor", "--json", "--models", models, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_report_is_complete_and_has_no_secrets(tmp_path: Path) -> None:
    secret = "hf_secret_token_1234"
    found = report(tmp_path, HF_TOKEN=secret, FLUX_FP4_SECRET=secret)
    assert set(found) == SECTIONS
    assert secret not in json.dumps(found)
    for name, value in os.environ.items():
        # the path of Python may be in a variable; what else is long and unique must not be there
        if len(value) > 20 and "/" not in value:
            assert value not in json.dumps(found), name
    assert found["pack"]["version"] == "0.1.0"
    assert found["packages"]["rich"]
    assert found["memory_bytes"] > 1 << 30
    assert found["disk"][0]["free_bytes"] > 0
    assert found["torch"]["version"]
    assert found["tensorrt_rtx"]["version"]
    assert found["models"]["checkpoints"] == []


def test_text_has_the_same_sections(tmp_path: Path) -> None:
    done = run_command("doctor", "--models", tmp_path)
    assert done.returncode == 0
    heads = {line.partition(":")[0] for line in done.stdout.splitlines() if line[0] != " "}
    assert heads == SECTIONS


def test_a_broken_folder_is_a_finding(tmp_path: Path) -> None:
    engine = tmp_path / "a" / "sm120"
    engine.mkdir(parents=True)
    (tmp_path / "a" / "a.safetensors").write_bytes(b"\xff" * 50)
    (engine / "manifest.json").write_text('{"format_version": 99}')
    (engine / "self_test.json").write_text("[")
    (engine / "self_test_failed.json").write_text('{"gpu": "G"}')
    (engine / "runtime-01234567.cache").write_bytes(b"x")
    found = report(tmp_path)
    (checkpoint,) = found["models"]["checkpoints"]
    assert checkpoint["state"].startswith("refused")
    assert checkpoint["engines"][0]["state"].startswith("manifest refused")
    (machine,) = found["machines"]
    assert machine["kernels"] == [{"of": None, "bytes": 1}]
    assert machine["self_tests_passed"] == []
    assert machine["self_test_failed"] == {"gpu": "G"}


def test_without_a_models_folder_the_rest_is_reported(tmp_path: Path) -> None:
    found = report(tmp_path / "absent")
    assert "no folder" in found["models"]["error"]
    assert found["packages"]["numpy"]


def test_without_any_package_the_rest_is_reported(tmp_path: Path) -> None:
    for name in ("pydantic", "rich", "filelock", "torch"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('broken here')")
    models = tmp_path / "models"
    models.mkdir()
    found = report(models, PYTHONPATH=str(tmp_path))
    assert "broken here" in found["models"]["error"]
    assert found["torch"]["error"] == "ImportError: broken here"
    assert found["packages"]["numpy"]


def test_a_library_that_crashes_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text("import os; os.abort()")
    found = report(tmp_path, PYTHONPATH=str(tmp_path))
    assert "ended with code" in found["tensorrt_rtx"]["error"]
    assert found["torch"]["version"]


def test_a_library_that_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(native_probes, "TIMEOUT_SECONDS", 1.0)
    assert NativeProbe("tensorrt_rtx").result() == {"error": "no answer within 1 seconds"}


def test_a_probe_that_fails_leaves_its_error() -> None:
    assert probed(lambda: 1 / 0) == {"error": "ZeroDivisionError: division by zero"}


def test_the_comfyui_tree_around_the_pack_is_the_default(tmp_path: Path) -> None:
    tree = tmp_path / "ComfyUI"
    (tree / "custom_nodes").mkdir(parents=True)
    (tree / "folder_paths.py").touch()
    (tree / "comfyui_version.py").write_text('__version__ = "0.30.0"\n')
    pack = tree / "custom_nodes" / "any-name"
    # output is what `make demo` makes, with a link back to the pack in it
    ignored = shutil.ignore_patterns(".*", "tests", "docs", "web", "workflows", "output")
    shutil.copytree(ROOT, pack, ignore=ignored)
    done = subprocess.run(
        [sys.executable, str(pack), "doctor", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["pack"]["comfyui"] == "0.30.0"
    assert found["models"]["models"] == [str(tree / "models" / "flux_fp4")]
    # installed under the folder's own name
    done = subprocess.run(
        [sys.executable, "-m", "any-name", "list"],
        cwd=tree / "custom_nodes", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "No quantized checkpoint" in done.stdout
