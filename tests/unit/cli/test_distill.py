"""Command `qad`: what it refuses before anything is loaded, and its help."""

from __future__ import annotations

import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from flux_fp4.cli.program import main
from flux_fp4.quant.calibration_files import save_samples
from quantize_tiny import quantize
from tiny_flux import random_flux, random_samples, save_flux


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    source = save_flux(random_flux(), folder / "source.safetensors")
    save_samples(random_samples(), folder / "mine.samples.safetensors")
    quantize(source, folder / "models" / "tiny" / "tiny.safetensors")
    shutil.rmtree(folder / "models" / "tiny" / "statistics")
    return folder


def qad(inputs: Path, *more: str, names: tuple[str, str] = ("tiny", "new")) -> tuple[int, str]:
    command = ["qad", str(inputs / "source.safetensors"), *names]
    command += ["--samples", str(inputs / "mine.samples.safetensors")]
    command += ["--models", str(inputs / "models"), *more]
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        code = main(command)
    assert output.getvalue() == ""
    return code, errors.getvalue()


REFUSED = {
    "steps": (("--steps", "0"), "Option --steps"),
    "batch": (("--batch", "0"), "Option --batch"),
    "average": (("--ema", "1"), "Option --ema"),
    "resolution without x": (("--resolution", "1024"), "Option --resolution"),
    "odd resolution": (("--resolution", "100x64"), "Option --resolution"),
    "trajectories": (("--trajectories", "1"), "Option --trajectories"),
    "more points than steps": (("--points", "21"), "Option --points"),
    "rate": (("--learning-rate", "2"), "Option --learning-rate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_are_refused_by_name(inputs: Path, case: str) -> None:
    options, message = REFUSED[case]
    code, errors = qad(inputs, *options)
    assert (code, message in errors) == (1, True), errors
    assert [path.name for path in (inputs / "models").iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tiny", "tiny"), "would replace the checkpoint"),
        (("absent", "new"), "no quantized checkpoint 'absent'"),
        (("tiny", "../new"), "cannot be the name"),
    ],
    ids=str,
)
def test_names_are_refused(inputs: Path, names: tuple[str, str], message: str) -> None:
    code, errors = qad(inputs, names=names)
    assert (code, message in errors) == (1, True), errors


def test_help_says_how_to_launch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["qad", "--help"])
    assert done.value.code == 0
    assert "accelerate launch --config_file" in capsys.readouterr().out
