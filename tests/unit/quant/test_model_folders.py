"""The layout of model folders, and names that must not become paths."""

from __future__ import annotations

from pathlib import Path

import pytest
from flux_fp4.quant.model_folders import ModelFolders, name_fault

HOSTILE = (
    "", ".", "..", "../a", "a/b", "a\\b", "/etc", "C:", "a\0b", " a", "a ", "a.", ".hidden",
    "con", "NUL.txt", "lpt1", "a*b", "a?b", "x" * 101, "ä" * 51, "a\nb", "<a>", "a|b", 'a"b',
)  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> ModelFolders:
    first, second = tmp_path / "first", tmp_path / "second"
    for root, name in ((first, "a"), (second, "b"), (second, "a")):
        (root / name).mkdir(parents=True)
        (root / name / f"{name}.safetensors").touch()
    (second / "b" / "sm120").mkdir()
    (second / "b" / "sm120" / "manifest.json").touch()
    (first / "empty").mkdir()
    return ModelFolders([first, second, tmp_path / "absent"])


def test_the_first_folder_wins(folders: ModelFolders) -> None:
    first, second, _ = folders.roots
    assert folders.checkpoints() == ["a", "b"]
    assert folders.checkpoint("a") == first / "a" / "a.safetensors"
    assert folders.checkpoint("b") == second / "b" / "b.safetensors"
    assert folders.new_checkpoint("b") == second / "b" / "b.safetensors"
    assert folders.new_checkpoint("empty") == first / "empty" / "empty.safetensors"
    assert folders.checkpoint("empty") is None
    assert folders.engines() == ["b/sm120"]
    assert folders.engine("b/sm120") == second / "b" / "sm120"
    assert folders.statistics == first / ".statistics"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_lead_nowhere(folders: ModelFolders, name: str) -> None:
    assert name_fault(name)
    assert folders.checkpoint(name) is None
    assert folders.recipe(name) is None
    assert folders.engine(f"b/{name}") is None
    assert folders.engine(f"{name}/sm120") is None


@pytest.mark.parametrize("name", ["a", "flux1-dev nvfp4", "ä", "con2", "v1.0", "x" * 100])
def test_plain_names_are_fine(name: str) -> None:
    assert name_fault(name) is None


def test_saved_samples_never_look_like_a_checkpoint(folders: ModelFolders) -> None:
    path = folders.samples("samples")
    path.parent.mkdir(parents=True)
    path.touch()
    assert "samples" not in folders.checkpoints()
