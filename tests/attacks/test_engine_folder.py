"""Engine folders that were damaged, moved between machines, or made by somebody else.

Each must give its own clear error, deserialize nothing and delete nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flux_fp4.trt_runtime.backend import Backend, Gpu, choose_backend, load_backend
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.errors import EngineError
from flux_fp4.trt_runtime.errors.backend import EngineTargetError, EngineVersionError
from flux_fp4.trt_runtime.errors.engine import (
    EngineStaleError,
    ManifestInvalidError,
    ManifestMissingError,
    PlanDigestError,
    PlanMissingError,
    PlanTruncatedError,
)
from flux_fp4.trt_runtime.manifest import check_plan, load_manifest, verify_engine

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True)
def nothing_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when TensorRT or ONNX Runtime is given anything."""
    import onnxruntime

    def opened(*_: object, **__: object) -> None:
        pytest.fail("something was deserialized")

    monkeypatch.setattr(load_backend("tensorrt_rtx").module, "Runtime", opened)
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def plan_of(engine_dir: Path, position: int = 0) -> Path:
    return engine_dir / load_manifest(engine_dir).blocks[position].file


def edit_manifest(engine_dir: Path, edit: Edit) -> None:
    path = engine_dir / "manifest.json"
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))


def refused(engine_dir: Path, kind: type[EngineError]) -> EngineError:
    """Open the engine, check the error and that the folder is untouched."""
    before = contents(engine_dir.parent)
    with pytest.raises(kind) as caught:
        Engine.open(engine_dir, "auto")
    assert type(caught.value) is kind
    assert contents(engine_dir.parent) == before
    return caught.value


def test_intact_engine_opens(engine_copy: Path) -> None:
    assert not Engine.open(engine_copy).loaded


def test_flipped_bit_in_a_plan(engine_copy: Path) -> None:
    plan = plan_of(engine_copy, 1)
    data = bytearray(plan.read_bytes())
    data[-1] ^= 1
    plan.write_bytes(data)
    error = refused(engine_copy, PlanDigestError)
    assert plan.name in str(error)
    assert "built on this machine" in str(error)


def test_plan_changed_between_check_and_use(engine_copy: Path) -> None:
    entry = load_manifest(engine_copy).blocks[0]
    plan = engine_copy / entry.file
    plan.write_bytes(bytes(entry.bytes))
    with pytest.raises(PlanDigestError):
        check_plan(engine_copy, entry)


def test_truncated_plan(engine_copy: Path) -> None:
    plan = plan_of(engine_copy)
    size = plan.stat().st_size
    plan.write_bytes(plan.read_bytes()[: size // 2])
    error = refused(engine_copy, PlanTruncatedError)
    assert str(size) in str(error)
    assert str(size // 2) in str(error)


def test_missing_plan(engine_copy: Path) -> None:
    plan_of(engine_copy).unlink()
    refused(engine_copy, PlanMissingError)


def test_plan_that_is_a_link(engine_copy: Path, tmp_path: Path) -> None:
    plan = plan_of(engine_copy)
    elsewhere = plan.rename(tmp_path / "elsewhere.plan")
    plan.symlink_to(elsewhere)
    refused(engine_copy, PlanMissingError)


def test_plans_without_manifest(engine_copy: Path) -> None:
    (engine_copy / "manifest.json").unlink()
    error = refused(engine_copy, ManifestMissingError)
    assert (error.plans, error.unfinished) == (2, False)
    assert "2 plan files found, none was opened" in str(error)


def test_plans_of_an_unfinished_build(engine_copy: Path) -> None:
    (engine_copy / "manifest.json").rename(engine_copy / "build.json")
    error = refused(engine_copy, ManifestMissingError)
    assert error.unfinished
    assert "did not finish" in str(error)


def test_folder_that_does_not_exist(engine_copy: Path) -> None:
    refused(engine_copy.parent / "sm999", ManifestMissingError)


def test_onnx_exported_again_after_the_build(engine_copy: Path) -> None:
    onnx = engine_copy.parent / "single_blocks.0.onnx"
    onnx.write_bytes(onnx.read_bytes().replace(b"nvfp4-max", b"nvfp4-min"))
    error = refused(engine_copy, EngineStaleError)
    assert "single_blocks.0" in str(error)


def test_other_release_of_the_library(engine_copy: Path) -> None:
    installed = load_backend("tensorrt_rtx")
    before = contents(engine_copy)
    with pytest.raises(EngineVersionError) as caught:
        verify_engine(
            engine_copy, load_manifest(engine_copy), replace(installed, version="1.8.0.1")
        )
    assert caught.value.built_with == f"tensorrt_rtx {installed.version}"
    assert caught.value.installed == "tensorrt_rtx 1.8.0.1"
    assert contents(engine_copy) == before


def test_plans_of_the_other_library(engine_copy: Path) -> None:
    other = Backend("tensorrt", load_backend("tensorrt_rtx").version, None, False, False)
    with pytest.raises(EngineVersionError):
        verify_engine(engine_copy, load_manifest(engine_copy), other)


def test_other_gpu_generation(engine_copy: Path) -> None:
    manifest = load_manifest(engine_copy)
    gpu = Gpu("sm89", "NVIDIA GeForce RTX 4090", "")
    with pytest.raises(EngineTargetError) as caught:
        choose_backend("tensorrt_rtx", manifest.backend, manifest.targets, gpu)
    assert (caught.value.sm, caught.value.targets) == ("sm89", ("sm120",))
    assert "targets SM120; this GPU is SM89 (NVIDIA GeForce RTX 4090)" in str(caught.value)


def first(fields: dict[str, Any]) -> dict[str, Any]:
    return fields["blocks"][0]


HOSTILE_EDITS: dict[str, tuple[Edit, str]] = {
    "parent folder": (lambda f: first(f).update(file="../evil.plan"), "blocks.0"),
    "absolute path": (lambda f: first(f).update(file="/etc/passwd"), "blocks.0"),
    "windows path": (lambda f: first(f).update(file="C:\\x.plan"), "blocks.0"),
    "backslash": (lambda f: first(f).update(file="..\\evil.plan"), "blocks.0"),
    "other plan's name": (lambda f: first(f).update(file=f["blocks"][1]["file"]), "blocks.0"),
    "path in the block": (lambda f: first(f).update(block="../x"), "blocks.0.block"),
    "key with a path": (lambda f: first(f).update(key="../" + "0" * 61), "blocks.0.key"),
    "short digest": (lambda f: first(f).update(digest="00"), "blocks.0.digest"),
    "negative size": (lambda f: first(f).update(bytes=-1), "blocks.0.bytes"),
    "unknown key": (lambda f: f.update(run="rm"), "run"),
    "unknown key in a block": (lambda f: first(f).update(run="rm"), "blocks.0.run"),
    "unknown key in the profile": (lambda f: f["profile"].update(x=1), "profile.x"),
    "impossible profile": (lambda f: f["profile"].update(max_batch=0), "profile"),
    "missing key": (lambda f: f.pop("targets"), "targets"),
    "unknown library": (lambda f: f.update(backend="os"), "backend"),
    "unknown target": (lambda f: f.update(targets=["../x"]), "targets.0"),
    "later format": (lambda f: f.update(format_version=3), "format_version"),
    "missing block": (lambda f: f["blocks"].pop(), "blocks"),
    "repeated block": (lambda f: f["blocks"].append(f["blocks"][0]), "blocks"),
    "other order": (lambda f: f["blocks"].reverse(), "blocks"),
    "a billion blocks": (lambda f: f.update(depth=10**9), "depth"),
}


@pytest.mark.parametrize(("edit", "field"), HOSTILE_EDITS.values(), ids=list(HOSTILE_EDITS))
def test_manifest_with_a_hostile_field(engine_copy: Path, edit: Edit, field: str) -> None:
    edit_manifest(engine_copy, edit)
    error = refused(engine_copy, ManifestInvalidError)
    assert error.field == field
    assert "manifest.json" in str(error)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[]", b"{", b"null", b"[" * 100_000],
    ids=["empty", "not text", "list", "cut", "null", "deep"],
)
def test_manifest_that_is_not_one(engine_copy: Path, content: bytes) -> None:
    (engine_copy / "manifest.json").write_bytes(content)
    refused(engine_copy, ManifestInvalidError)


def test_manifest_of_unreasonable_size(engine_copy: Path) -> None:
    with (engine_copy / "manifest.json").open("r+b") as file:
        file.truncate(9 << 20)
    before = {p.name for p in engine_copy.iterdir()}
    with pytest.raises(ManifestInvalidError, match="larger"):
        Engine.open(engine_copy)
    assert {p.name for p in engine_copy.iterdir()} == before
