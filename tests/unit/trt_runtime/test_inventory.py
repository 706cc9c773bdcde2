"""Engines beside a checkpoint with their state, for whoever shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock
from flux_fp4.trt_runtime.backend import Gpu
from flux_fp4.trt_runtime.in_use import InUseMark
from flux_fp4.trt_runtime.inventory import StoredEngine, stored_engines
from flux_fp4.trt_runtime.manifest import load_manifest, plan_files


def only(engine_dir: Path, gpu: Gpu | None = None) -> StoredEngine:
    digest = load_manifest(engine_dir).checkpoint_digest
    (engine,) = stored_engines(engine_dir.parent, digest, gpu)
    return engine


def test_a_ready_engine(engine_copy: Path) -> None:
    engine = only(engine_copy)
    assert (engine.name, engine.status, engine.plans) == ("tiny/sm120", "ready", 2)
    assert engine.bytes == sum(path.stat().st_size for path in plan_files(engine_copy))
    assert engine.manifest == load_manifest(engine_copy)
    assert not engine.is_in_use
    assert not engine.is_being_built


@pytest.mark.parametrize(
    ("gpu", "status"),
    [
        (Gpu("sm120", "RTX 5090", ""), "ready"),
        (Gpu("", "", "no CUDA device"), "ready"),
        (
            Gpu("sm89", "RTX 4090", ""),
            "other target: built for SM120, this GPU is SM89 (RTX 4090)",
        ),
    ],
    ids=["its own GPU", "no GPU", "another GPU"],
)
def test_an_engine_for_another_gpu_is_not_stale(engine_copy: Path, gpu: Gpu, status: str) -> None:
    engine = only(engine_copy, gpu)
    assert engine.status == status
    assert not engine.state.is_stale


def test_what_others_do_with_it_is_told(engine_copy: Path) -> None:
    with FileLock(engine_copy / "build.lock"):
        assert only(engine_copy).status == "being built"
    mark = InUseMark(engine_copy)
    assert only(engine_copy).is_in_use
    mark.release()


def test_an_unfinished_engine_is_listed(engine_copy: Path) -> None:
    (engine_copy / "manifest.json").rename(engine_copy / "build.json")
    (engine,) = stored_engines(engine_copy.parent, None)
    assert engine.status == "unfinished build: 2 plans"
    assert engine.manifest is None
