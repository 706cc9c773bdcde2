"""Every digest of an engine: what is changed anywhere is found, all of it in one go."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from flux_fp4.tests.unit.trt_runtime.small_spec import silent
from flux_fp4.trt_runtime.engine_verification import verify_everything
from flux_fp4.trt_runtime.errors.engine import ManifestInvalidError, ManifestMissingError
from flux_fp4.trt_runtime.manifest import (
    BAKED,
    VARIANTS,
    load_manifest,
    plan_files,
    write_manifest,
)

KEY = "0123456789abcdef" * 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def with_bake(engine_dir: Path) -> Path:
    """A bake whose blocks are the engine's own, and a record of variants that are the same."""
    bake = engine_dir.parent / "baked" / KEY
    bake.mkdir(parents=True)
    for path in engine_dir.parent.iterdir():
        if path.is_file():
            shutil.copy(path, bake)
    plans = bake / engine_dir.name
    shutil.copytree(engine_dir, plans)
    (plans / "manifest.json").rename(plans / BAKED)
    write_manifest(engine_dir / VARIANTS, load_manifest(engine_dir))
    return plans


def test_an_untouched_engine_has_no_faults(engine_copy: Path) -> None:
    phases = []
    digest = load_manifest(engine_copy).checkpoint_digest
    found = verify_everything(engine_copy, digest, lambda *step: phases.append(step))
    assert (found.plans, found.faults) == (2, ())
    assert phases[-1] == ("Verified", 2, 2)


def test_variants_and_bakes_are_checked(engine_copy: Path) -> None:
    plans = with_bake(engine_copy)
    found = verify_everything(engine_copy, None, silent)
    assert (found.plans, found.faults) == (6, ())
    flip(next(plan_files(plans)))
    (fault,) = verify_everything(engine_copy, None, silent).faults
    assert KEY in fault
    assert "wrong digest" in fault


def test_all_faults_are_told(engine_copy: Path) -> None:
    double, single = plan_files(engine_copy)
    flip(double)
    single.unlink()
    (engine_copy / VARIANTS).write_text("{")
    found = verify_everything(engine_copy, "0" * 64, silent).faults
    assert len(found) == 4
    assert "quantized again" in found[0]
    assert "variants.json" in found[1]
    assert "wrong digest" in found[2]
    assert "is missing" in found[3]


def test_changed_weights_are_found(engine_copy: Path) -> None:
    (weights,) = engine_copy.parent.glob("*.safetensors")
    flip(weights)
    faults = verify_everything(engine_copy, None, silent).faults
    assert faults
    assert all("was built from other bytes" in fault for fault in faults)


def test_a_changed_onnx_file_is_found(engine_copy: Path) -> None:
    path = engine_copy.parent / "single_blocks.0.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    (fault,) = verify_everything(engine_copy, None, silent).faults
    assert "exported again" in fault


def test_an_engine_without_a_usable_manifest_is_refused(engine_copy: Path) -> None:
    (engine_copy / "manifest.json").write_text("{}")
    with pytest.raises(ManifestInvalidError):
        verify_everything(engine_copy, None, silent)
    (engine_copy / "manifest.json").unlink()
    with pytest.raises(ManifestMissingError):
        verify_everything(engine_copy, None, silent)


def test_cancel_passes(engine_copy: Path) -> None:
    def cancel(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_everything(engine_copy, None, cancel)
