"""What a picker says of an engine."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from flux_fp4.trt_runtime.glance import UP_TO_DATE, freshness
from flux_fp4.trt_runtime.manifest import load_manifest, plan_files


def change(engine_dir: Path, **fields: str) -> None:
    path = engine_dir / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def digest(engine_copy: Path) -> str:
    return load_manifest(engine_copy).checkpoint_digest


def test_a_fresh_engine(engine_copy: Path, digest: str) -> None:
    assert freshness(engine_copy, digest) == UP_TO_DATE


def test_another_checkpoint(engine_copy: Path) -> None:
    assert freshness(engine_copy, "0" * 64) == "quantized again after the build"


def test_another_library(engine_copy: Path, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change(engine_copy, backend_version="0.1")
    assert freshness(engine_copy, digest) == "built with another library version"

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    # pip does not know it under this name; whether it is there is found on loading
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert freshness(engine_copy, digest) == UP_TO_DATE


def test_missing_and_shortened_plans(engine_copy: Path, digest: str) -> None:
    plan = next(plan_files(engine_copy))
    plan.write_bytes(plan.read_bytes()[:-1])
    assert freshness(engine_copy, digest) == "plans missing or damaged"
    plan.unlink()
    assert freshness(engine_copy, digest) == "plans missing or damaged"


def test_a_manifest_says_nothing_itself(engine_copy: Path, digest: str) -> None:
    change(engine_copy, backend_version="<img src=x onerror=alert(1)>")
    assert freshness(engine_copy, digest) == "built with another library version"
    change(engine_copy, backend="<b>")
    assert freshness(engine_copy, digest) == "manifest refused"


def test_an_unfinished_engine(engine_copy: Path, digest: str) -> None:
    (engine_copy / "manifest.json").rename(engine_copy / "build.json")
    assert freshness(engine_copy, digest) == "unfinished"
