"""ImageReward's process, with a stand-in for the package that ends in each way it can end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from flux_fp4.quant.errors.quality import MetricLibraryError, MetricWeightsError
from flux_fp4.quant.quality.image_reward import (
    PYTHON_VARIABLE,
    ImageReward,
    ImageRewardFailedError,
)
from flux_fp4.quant.quality.pictures import BatchPictures
from quality_pictures import picture_batch, silent

WORKING = """
from PIL import Image
import numpy as np

class Model:
    def score(self, prompt, file):
        print("the package prints")
        return np.float32(len(prompt) + np.asarray(Image.open(file)).mean() / 255)

def load(name, device):
    print("load checkpoint")
    return Model()
"""
WITHOUT_WEIGHTS = """
def load(name, device):
    raise OSError("We couldn't connect to 'https://huggingface.co'")
"""
BROKEN = """
def load(name, device):
    raise RuntimeError("CUDA is on fire")
"""


def stand_in(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "ImageReward.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_rewards_are_those_of_each_picture_and_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, WORKING, monkeypatch)
    pictures = BatchPictures("small", picture_batch(2, 0.2, seed=1))
    found = ImageReward().values(pictures, ["a cat", "a long prompt"], silent)
    means = [pictures[index].float().mean().item() / 255 for index in range(2)]
    assert found == pytest.approx([5 + means[0], 13 + means[1]], abs=1e-4)


def test_missing_package_names_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(MetricLibraryError, match="No module named 'ImageReward'") as caught:
        ImageReward()
    assert "pip install image-reward" in caught.value.install
    assert PYTHON_VARIABLE in caught.value.install


def test_missing_interpreter_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, "/nowhere/python")
    with pytest.raises(MetricLibraryError, match="/nowhere/python"):
        ImageReward()


def test_variable_names_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, WITHOUT_WEIGHTS, monkeypatch)
    link = tmp_path / "python"
    link.write_text(f'#!/bin/sh\ntouch {tmp_path / "used"}\nexec {sys.executable} "$@"\n')
    link.chmod(0o755)
    monkeypatch.setenv(PYTHON_VARIABLE, str(link))
    with pytest.raises(MetricWeightsError) as caught:
        ImageReward()
    assert (tmp_path / "used").exists()
    assert caught.value.host == "huggingface.co"
    assert "couldn't connect" in caught.value.reason


def test_any_other_end_is_told_with_its_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, BROKEN, monkeypatch)
    with pytest.raises(ImageRewardFailedError, match="CUDA is on fire") as caught:
        ImageReward()
    assert caught.value.code == 1
