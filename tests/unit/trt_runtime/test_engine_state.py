"""What is said about an engine without opening a plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from flux_fp4.trt_runtime import engine_state as module
from flux_fp4.trt_runtime.engine_state import engine_state
from flux_fp4.trt_runtime.errors.backend import BackendMissingError
from flux_fp4.trt_runtime.manifest import load_manifest


def first_plan(engine_dir: Path) -> Path:
    return engine_dir / load_manifest(engine_dir).blocks[0].file


def other_version(engine_dir: Path) -> None:
    path = engine_dir / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"backend_version": "1.0.0"}))


def other_onnx(engine_dir: Path) -> None:
    path = engine_dir.parent / "double_blocks.0.onnx"
    path.write_bytes(path.read_bytes() + b"\0")


def test_a_finished_engine_is_ready(engine_copy: Path) -> None:
    digest = load_manifest(engine_copy).checkpoint_digest
    for known in (digest, None):
        state = engine_state(engine_copy, known)
        assert (state.fault, state.is_stale) == ("", False)
        assert state.manifest is not None


CHANGES: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "version": (other_version, "library updated: built with tensorrt_rtx 1.0.0", True),
    "onnx": (other_onnx, "exported again after the build", True),
    "missing": (lambda d: first_plan(d).unlink(), "plan missing: double_blocks.0-", True),
    "short": (lambda d: first_plan(d).write_bytes(b"x"), "plan damaged: double_blocks.0-", True),
    "manifest": (lambda d: (d / "manifest.json").write_text("{"), "manifest refused", True),
    "unfinished": (
        lambda d: (d / "manifest.json").rename(d / "build.json"),
        "unfinished build: 2 plans",
        False,
    ),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "no manifest: 2 plans", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_told(engine_copy: Path, change: str) -> None:
    edit, text, is_stale = CHANGES[change]
    edit(engine_copy)
    state = engine_state(engine_copy, None)
    assert state.fault.startswith(text)
    assert state.is_stale == is_stale


def test_another_checkpoint_is_told(engine_copy: Path) -> None:
    state = engine_state(engine_copy, "0" * 64)
    assert (state.fault, state.is_stale) == ("quantized again after the build", True)


def test_without_its_library_an_engine_is_not_stale(
    engine_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise BackendMissingError(name, "tensorrt-rtx>=1.7", "No module named 'tensorrt_rtx'")

    monkeypatch.setattr(module, "load_backend", absent)
    state = engine_state(engine_copy, None)
    assert "does not import here" in state.fault
    assert not state.is_stale


def test_a_broken_manifest_without_plans_is_not_ours_to_delete(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert not engine_state(tmp_path, None).is_stale
