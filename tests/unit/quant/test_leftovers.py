"""What quantization leaves is found when it is old enough, and deleted without other files."""

from __future__ import annotations

import os
from pathlib import Path

from flux_fp4.quant.leftovers import YOUNG_SECONDS, find_leftovers, statistics_bytes
from flux_fp4.quant.model_folders import ModelFolders

NOW = 2_000_000_000.0
STATISTICS = f"{'0' * 16}-{'1' * 16}"


def write(path: Path, age: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"12345")
    os.utime(path, (NOW - age, NOW - age))
    return path


def test_old_statistics_go_without_what_others_put_there(tmp_path: Path) -> None:
    folders = ModelFolders([tmp_path])
    folder = tmp_path / ".statistics" / STATISTICS
    write(folder / "double_blocks.0.safetensors", 2 * YOUNG_SECONDS)
    own = write(folder / "notes.txt", 0)
    assert statistics_bytes(folders) == 5
    (found,) = find_leftovers(folders, NOW)
    assert (found.kind, found.path, found.bytes) == ("statistics", folder, 5)
    assert found.used == NOW - 2 * YOUNG_SECONDS
    assert found.remove is not None
    assert found.remove() == 5
    assert list(folder.iterdir()) == [own]


def test_young_ones_may_be_in_use(tmp_path: Path) -> None:
    write(tmp_path / ".statistics" / STATISTICS / "double_blocks.0.safetensors", 60)
    assert find_leftovers(ModelFolders([tmp_path]), NOW) == []


def test_an_unfinished_quantization_is_only_reported(tmp_path: Path) -> None:
    partial = write(tmp_path / "tiny" / ".tiny.partial", 2 * YOUNG_SECONDS)
    (found,) = find_leftovers(ModelFolders([tmp_path]), NOW)
    assert (found.path, found.remove) == (partial, None)
