"""The command `quality`: folders, a checkpoint, and the number of prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import run_command
from flux_fp4.cli.program import main
from flux_fp4.quant.quality.report import QualityReport
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from PIL import Image
from quality_pictures import picture_batch
from quantize_tiny import quantize
from tiny_flux import random_flux, save_flux

COUNT = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pictures")
    found = []
    for name, noise in (("bf16", 0.0), ("ptq", 0.2), ("qat", 0.05)):
        folder = root / name
        folder.mkdir()
        for index, picture in enumerate(picture_batch(COUNT, noise, seed=1)):
            pixels = (picture.numpy() * 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
        found.append(folder)
    return found


def test_folders_are_compared_without_any_download(folders: list[Path], tmp_path: Path) -> None:
    done = run_command(
        "quality", *folders, "--json", tmp_path / "r.json", "--chart", tmp_path / "grid.png"
    )
    assert done.returncode == 0, done.stderr
    assert "5 pictures of 'ptq' and 'qat', original 'bf16'" in done.stdout
    assert "Comparing ptq with bf16" in done.stderr
    report = QualityReport.model_validate_json((tmp_path / "r.json").read_text())
    ptq, qat = (report.of("psnr", name) for name in ("ptq", "qat"))
    assert ptq is not None
    assert qat is not None
    assert min(qat) > max(ptq) + 6
    assert {found.metric for found in report.comparisons} == {"psnr", "ssim"}
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width == 1200


def test_markdown_is_a_table(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", *map(str, folders[:2]), "--metric", "ssim", "--markdown"]) == 0
    assert "| SSIM | higher | ptq |" in capsys.readouterr().out


def test_checkpoint_is_reported_with_a_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny" / "tiny.safetensors"
    quantize(save_flux(random_flux(), tmp_path / "source.safetensors"), path)
    chart, data = tmp_path / "sqnr.png", tmp_path / "sqnr.json"
    arguments = ["--models", tmp_path, "--chart", chart, "--json", data]
    assert main(["quality", "tiny", *map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    linears = QuantizedCheckpoint.read(path).metadata.linears
    for linear in linears:
        assert linear.name in shown
    assert len(json.loads(data.read_text())["linears"]) == len(linears)
    with Image.open(chart) as picture:
        assert picture.width >= 1000


def test_prompts_needed_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", "--difference", "0.5", "--deviation", "1"]) == 0
    assert capsys.readouterr().out.startswith("34 prompts show a mean difference of 0.5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "two folders, a checkpoint, or --difference"),
        (["--difference", "0", "--deviation", "1"], "must not be 0"),
        (["a", "b", "--difference", "1"], "goes with no input"),
        (["a", "b", "c", "d"], "two or three"),
        (["a", "b"], "'a' is no folder with pictures"),
    ],
    ids=["nothing", "no difference", "both", "too many", "no folder"],
)
def test_wrong_arguments_are_refused(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["quality", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_prompts_that_are_needed_are_asked_for(
    folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quality", *map(str, folders), "--metric", "clip_score"]) == 1
    assert "they are needed for CLIPScore" in capsys.readouterr().err


def test_picture_without_partner_is_named(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(folders[1], tmp_path / "ptq")
    (other / "3.png").unlink()
    assert main(["quality", str(folders[0]), str(other)]) == 1
    assert "'3.png'" in capsys.readouterr().err


def test_chart_of_unknown_format_is_refused(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*folders[:2], "--chart", tmp_path / "grid.xyz"]
    assert main(["quality", *map(str, arguments)]) == 1
    assert ".png" in capsys.readouterr().err
