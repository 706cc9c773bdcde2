from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from distill_tiny import Distilled, distill_here, distillation
from flux_fp4.quant.calibration_files import save_samples
from quantize_tiny import quantize, with_recipe
from tiny_flux import random_samples


@pytest.fixture(scope="session")
def inputs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, samples of eight prompts, and models with `tiny` made from both."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copy(source, folder / "source.safetensors")
    samples = random_samples(pictures=8)
    save_samples(samples, folder / "mine.samples.safetensors")
    models = folder / "models"
    path = models / "tiny" / "tiny.safetensors"
    quantize(source, path, with_recipe("nvfp4-mse"), samples, statistics=models / ".statistics")
    return folder


@pytest.fixture(scope="session")
def distilled(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    models = tmp_path_factory.mktemp("distilled")
    return Distilled(models, distill_here(distillation(inputs, models)))


@pytest.fixture
def models(inputs: Path, distilled: Distilled, tmp_path: Path) -> Path:
    """A models folder with the quantized checkpoint and the trajectories, and no run."""
    folder = tmp_path / "models"
    shutil.copytree(inputs / "models", folder)
    trajectories = Path(".training", "trajectories")
    shutil.copytree(distilled.models / trajectories, folder / trajectories)
    return folder
