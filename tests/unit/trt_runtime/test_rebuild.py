"""Stale engines are built again for what they were built for, and only they."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_SPEC, silent
from flux_fp4.trt_runtime import rebuild
from flux_fp4.trt_runtime.errors.build import PlanBuildError
from flux_fp4.trt_runtime.errors.storage import DiskFullError
from flux_fp4.trt_runtime.manifest import load_manifest
from flux_fp4.trt_runtime.rebuild import rebuild_stale, stale_engines


def change(engine_dir: Path, **fields: Any) -> None:
    path = engine_dir / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def digest_of(engine_dir: Path) -> str:
    return load_manifest(engine_dir).checkpoint_digest


def test_a_ready_engine_is_neither_exported_nor_built(engine_copy: Path) -> None:
    def export() -> None:
        raise AssertionError

    assert rebuild_stale(engine_copy.parent, digest_of(engine_copy), export, silent) == []


def test_an_engine_of_another_release_is_built_for_its_own_profile(engine_copy: Path) -> None:
    digest, exports = digest_of(engine_copy), []
    change(engine_copy, backend_version="0.1")
    (result,) = rebuild_stale(engine_copy.parent, digest, lambda: exports.append(1), silent)
    assert (result.name, result.fault) == ("tiny/sm120", "")
    assert result.reason.startswith("library updated: built with tensorrt_rtx 0.1")
    assert load_manifest(engine_copy).spec == SMALL_SPEC
    assert exports == [1]
    assert stale_engines(engine_copy.parent, digest) == []


def test_only_the_engine_that_is_wanted(engine_copy: Path) -> None:
    digest = digest_of(engine_copy)
    change(engine_copy, backend_version="0.1")
    other = engine_copy.parent / "sm121"
    assert rebuild_stale(engine_copy.parent, digest, lambda: None, silent, [other]) == []
    assert len(stale_engines(engine_copy.parent, digest)) == 1


def test_an_engine_without_a_readable_manifest_is_a_fault(engine_copy: Path) -> None:
    digest = digest_of(engine_copy)
    change(engine_copy, format_version=1)
    (result,) = rebuild_stale(engine_copy.parent, digest, lambda: None, silent)
    assert "format_version" in result.fault
    assert "Build TensorRT Engine" in result.fault


def test_a_manifest_in_the_wrong_folder_is_a_fault(engine_copy: Path) -> None:
    digest = digest_of(engine_copy)
    change(engine_copy, backend_version="0.1")
    moved = engine_copy.rename(engine_copy.with_name("sm121"))
    (result,) = rebuild_stale(moved.parent, digest, lambda: None, silent)
    assert "'sm120'" in result.fault
    assert not engine_copy.exists()


def test_a_failed_build_is_a_fault_and_a_full_disk_an_error(
    engine_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = digest_of(engine_copy)
    change(engine_copy, backend_version="0.1")
    raised: list[Exception] = [PlanBuildError("double_blocks.0", ["no"])]

    def build(*_arguments: Any) -> None:
        raise raised[0]

    monkeypatch.setattr(rebuild, "build_engine", build)
    (result,) = rebuild_stale(engine_copy.parent, digest, lambda: None, silent)
    assert "cannot build block 'double_blocks.0'" in result.fault
    raised[0] = DiskFullError(engine_copy / "a.plan", 1, 0)
    with pytest.raises(DiskFullError):
        rebuild_stale(engine_copy.parent, digest, lambda: None, silent)
