"""A use is noted beside the plans, and never in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.last_use import LAST_USED, last_used, mark_used


def age(folder: Path, seconds: float) -> None:
    for path in folder.iterdir():
        os.utime(path, (seconds, seconds))


def test_loading_an_engine_is_a_use(engine_copy: Path) -> None:
    age(engine_copy, 1000)
    assert last_used(engine_copy) == 1000
    engine = Engine.open(engine_copy, "reference")
    assert last_used(engine_copy) == 1000
    engine.load(torch.device("cpu"))
    assert last_used(engine_copy) > 1e9
    assert (engine_copy / "manifest.json").stat().st_mtime == 1000


def test_a_lock_is_no_use(engine_copy: Path) -> None:
    age(engine_copy, 1000)
    (engine_copy / "build.lock").touch()
    assert last_used(engine_copy) == 1000


def test_an_empty_folder_has_its_own_time(tmp_path: Path) -> None:
    assert last_used(tmp_path) == tmp_path.stat().st_mtime


def test_a_read_only_folder_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "denied", str(path))

    monkeypatch.setattr(Path, "touch", denied)
    mark_used(tmp_path)
    assert not (tmp_path / LAST_USED).exists()
