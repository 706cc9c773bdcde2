"""Problems are found before work begins, each with its numbers and a next step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from comfy_in_process import import_comfyui
from quantize_tiny import with_recipe
from tiny_flux import random_flux, save_flux

import_comfyui()

from flux_fp4.nodes import preflight  # noqa: E402
from flux_fp4.nodes.errors import PreflightError  # noqa: E402
from flux_fp4.nodes.machine import Machine, folder_problems, memory_problems  # noqa: E402
from flux_fp4.quant.sources.source import FluxSource, open_source  # noqa: E402

GB = 10**9
GOOD = Machine("linux", 32 * GB, 100 * GB, "")
FOLDER = Path("/models/flux_fp4/flux1-dev")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> FluxSource:
    folder = tmp_path_factory.mktemp("source")
    return open_source(save_flux(random_flux(), folder / "source.safetensors"))


def test_a_good_machine_has_no_problems() -> None:
    assert folder_problems(GOOD, FOLDER, 17 * GB) == []
    assert memory_problems(GOOD, 2 * GB) == []


def test_small_disk_is_named_with_numbers() -> None:
    (problem,) = folder_problems(replace(GOOD, free_disk=9 * GB), FOLDER, 17 * GB)
    assert "9.0 GB" in problem
    assert "17.0 GB" in problem
    assert "extra_model_paths.yaml" in problem


def test_folder_that_cannot_be_written_to_is_named() -> None:
    (problem,) = folder_problems(replace(GOOD, write_fault="Read-only file system"), FOLDER, 0)
    assert str(FOLDER) in problem
    assert "Read-only file system" in problem


def test_small_memory_is_named_with_numbers() -> None:
    (problem,) = memory_problems(replace(GOOD, free_memory=GB), 2 * GB)
    assert "1.0 GB" in problem
    assert "2.0 GB" in problem


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("C:/ComfyUI/models/flux_fp4/flux1-dev", []),
        ("C:/Users/Jürgen/flux_fp4/flux1-dev", ["ASCII"]),
        ("C:/" + "a" * 200 + "/flux1-dev", ["characters"]),
        ("C:/" + "ä" * 200 + "/flux1-dev", ["characters", "ASCII"]),
    ],
)
def test_paths_that_windows_or_tensorrt_cannot_open(folder: str, expected: list[str]) -> None:
    found = folder_problems(replace(GOOD, system="win32"), Path(folder), 0)
    assert len(found) == len(expected)
    for problem, word in zip(found, expected, strict=True):
        assert word in problem
    assert folder_problems(GOOD, Path(folder), 0) == []


def test_this_machine_is_looked_at(tmp_path: Path) -> None:
    machine = Machine.at(tmp_path / "not" / "yet")
    assert machine.free_memory > 0
    assert machine.free_disk > 0
    assert machine.write_fault == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "target", "fault"),
    [
        ("nvfp4-max", "sm89", "'sm89' cannot run the NVFP4 weights"),
        ("fp8", "sm86", "'sm86' cannot run the FP8 weights"),
        ("nvfp4-max", "tensorrt-sm120", "'tensorrt' needs the Python package"),
    ],
)
def test_recipe_that_the_target_cannot_run_is_refused(
    source: FluxSource, tmp_path: Path, recipe: str, target: str, fault: str
) -> None:
    with pytest.raises(PreflightError) as error:
        preflight.require(source, with_recipe(recipe), target, tmp_path / "tiny")
    assert error.value.what == "tiny"
    assert len(error.value.problems) == 1
    assert fault in str(error.value)
    # before a target is chosen there is nothing to refuse
    preflight.require(source, with_recipe(recipe), None, tmp_path / "tiny")


def test_every_problem_is_listed_and_nothing_written(
    source: FluxSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Machine("linux", 1, 2, "Permission denied")
    monkeypatch.setattr(Machine, "at", lambda folder: small)
    with pytest.raises(PreflightError) as error:
        preflight.require(source, with_recipe("nvfp4-max"), "sm89", tmp_path / "tiny")
    assert len(error.value.problems) == 4
    assert str(error.value).startswith("'tiny' cannot be made here:\n- ")
    assert list(tmp_path.iterdir()) == []


def test_what_is_on_disk_already_is_not_needed_again(
    source: FluxSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, folder = with_recipe("nvfp4-max"), tmp_path / "tiny"
    folder.mkdir()
    needed = preflight.report(source, options, "sm120", folder)
    assert "Nothing stands in the way." in needed
    monkeypatch.setattr(Machine, "at", lambda folder: replace(GOOD, free_disk=1000))
    # what the work replaces takes its room until the new file is whole, other files for good
    for name in ("tiny.safetensors", "notes.txt", ".other.partial"):
        (folder / name).write_bytes(bytes(30_000_000))
    with pytest.raises(PreflightError, match="disk"):
        preflight.require(source, options, "sm120", folder)
    (folder / ".tiny.partial").write_bytes(bytes(30_000_000))
    preflight.require(source, options, "sm120", folder)


def test_report_has_every_stage(source: FluxSource, tmp_path: Path) -> None:
    text = preflight.report(source, with_recipe("nvfp4-max"), "sm120", tmp_path / "tiny")
    for part in (
        "source.safetensors",
        "Quantize with nvfp4-max",
        "Build for sm120",
        "Disk:",
        "GPU",
    ):
        assert part in text
    assert "PROBLEM" in preflight.report(source, with_recipe("fp8"), "sm86", tmp_path / "tiny")
