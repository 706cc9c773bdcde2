"""What can go, and that nothing else does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from flux_fp4.trt_runtime import cleanup
from flux_fp4.trt_runtime.cleanup import Finding, engine_folders, evict, find_unneeded
from flux_fp4.trt_runtime.errors.storage import EngineBusyError
from flux_fp4.trt_runtime.manifest import BAKED, load_manifest, plan_files
from flux_fp4.trt_runtime.runtime_cache import MAGIC, cache_owner

KEY = "0123456789abcdef" * 2
NOW = 2_000_000_000.0


def found(engine_dir: Path, digest: str | None = None, driver: str | None = None) -> list[Finding]:
    return list(find_unneeded(engine_dir.parent, digest, driver, NOW - 1000))


def age(folder: Path, seconds: float) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (seconds, seconds))


def write_cache(folder: Path, owner: str, name: str = "runtime-01234567.cache") -> Path:
    header = json.dumps({"owner": owner, "digest": "0"})
    (folder / name).write_bytes(MAGIC + header.encode() + b"\nkernels")
    return folder / name


def write_bake(engine_dir: Path, used: float = NOW) -> Path:
    bake = engine_dir.parent / "baked" / KEY
    shutil.copytree(engine_dir, bake / engine_dir.name)
    (bake / engine_dir.name / "manifest.json").rename(bake / engine_dir.name / BAKED)
    for path in engine_dir.parent.glob("*.onnx"):
        shutil.copy(path, bake)
    (bake / "blocks.safetensors").write_bytes(b"weights")
    age(bake, used)
    return bake


def test_a_ready_engine_has_nothing_to_delete(engine_copy: Path) -> None:
    write_bake(engine_copy)
    assert found(engine_copy) == []
    assert found(engine_copy, load_manifest(engine_copy).checkpoint_digest) == []


def test_a_stale_engine_goes_with_all_its_files(engine_copy: Path) -> None:
    write_cache(engine_copy, "x")
    (engine_copy / "self_test.json").write_text("{}")
    size = sum(p.stat().st_size for p in engine_copy.iterdir() if p.suffix != ".lock")
    (finding,) = found(engine_copy, "0" * 64)
    assert (finding.kind, finding.reason) == ("engine", "quantized again after the build")
    assert finding.bytes == size
    assert finding.remove is not None
    assert finding.remove() == size
    assert not engine_copy.exists()
    assert list(engine_copy.parent.glob("*.onnx"))


def test_files_of_others_stay(engine_copy: Path) -> None:
    own = engine_copy / "notes.txt"
    own.write_text("mine")
    (engine_copy / "mine.plan").write_bytes(b"another program's")
    (finding,) = found(engine_copy, "0" * 64)
    assert finding.remove is not None
    finding.remove()
    assert {p.name for p in engine_copy.iterdir()} - {"build.lock"} == {"notes.txt", "mine.plan"}


def test_an_engine_that_is_being_built_is_not_touched(engine_copy: Path) -> None:
    (finding,) = found(engine_copy, "0" * 64)
    before = sorted(engine_copy.iterdir())
    with FileLock(engine_copy / "build.lock"):
        assert found(engine_copy, "0" * 64) == []
        assert evict([engine_copy.parent], [], 0) == []
        assert finding.remove is not None
        with pytest.raises(EngineBusyError):
            finding.remove()
    assert sorted(engine_copy.iterdir()) == before


def test_an_engine_that_was_used_meanwhile_stays(engine_copy: Path) -> None:
    age(engine_copy, 1000)
    (finding,) = found(engine_copy, "0" * 64)
    (engine_copy / "last_used").touch()
    assert finding.remove is not None
    assert finding.remove() == 0
    assert (engine_copy / "manifest.json").is_file()


def test_plans_that_nobody_names_go(engine_copy: Path) -> None:
    plan = engine_copy / "double_blocks.0-0123456789ab.plan"
    plan.write_bytes(b"old")
    (finding,) = found(engine_copy)
    assert (finding.kind, finding.path, finding.bytes) == ("plan", plan, 3)
    assert finding.remove is not None
    assert finding.remove() == 3
    assert len(list(plan_files(engine_copy))) == 2


def test_plans_of_an_unfinished_build_stay(engine_copy: Path) -> None:
    (engine_copy / "manifest.json").rename(engine_copy / "build.json")
    (finding,) = found(engine_copy)
    assert (finding.kind, finding.remove) == ("unfinished build", None)


def test_plans_beside_an_unreadable_record_stay(engine_copy: Path) -> None:
    (engine_copy / "build.json").write_text("{")
    assert [finding.kind for finding in found(engine_copy)] == ["unfinished build"]


def test_temporary_files_go(engine_copy: Path) -> None:
    path = engine_copy / ".single_blocks.0-0123456789ab.plan.4711.tmp"
    path.write_bytes(b"half")
    (finding,) = found(engine_copy)
    assert (finding.kind, finding.path) == ("temporary file", path)


def test_kernels_of_other_drivers_and_releases_go(engine_copy: Path) -> None:
    built_with = load_manifest(engine_copy).built_with
    current = write_cache(engine_copy, f"{built_with} on GPU, driver 581.15")
    assert cache_owner(current) == f"{built_with} on GPU, driver 581.15"
    assert found(engine_copy, driver="581.15") == []
    assert found(engine_copy, driver=None) == []
    (finding,) = found(engine_copy, driver="590.1")
    assert (finding.kind, finding.path) == ("kernels", current)
    write_cache(engine_copy, "tensorrt_rtx 1.0 on GPU, driver 581.15")
    assert [finding.kind for finding in found(engine_copy, driver="581.15")] == ["kernels"]


@pytest.mark.parametrize("content", [b"", MAGIC, MAGIC + b"{", MAGIC + b"[1]\n", b"x" * 9000])
def test_a_cache_that_does_not_say_whose_it_is_stays(engine_copy: Path, content: bytes) -> None:
    path = engine_copy / "runtime-01234567.cache"
    path.write_bytes(content)
    assert cache_owner(path) is None
    assert found(engine_copy, driver="590.1") == []


def test_bakes_go_when_nobody_used_them(engine_copy: Path) -> None:
    bake = write_bake(engine_copy, NOW - 2000)
    (finding,) = found(engine_copy)
    assert (finding.kind, finding.path, finding.reason) == ("bake", bake, "not used for long")
    assert finding.remove is not None
    assert finding.remove() == finding.bytes
    assert not bake.exists()


def test_bakes_of_another_checkpoint_go(engine_copy: Path) -> None:
    write_bake(engine_copy)
    kinds = {finding.kind: finding.reason for finding in found(engine_copy, "0" * 64)}
    assert kinds["bake"] == "its checkpoint was quantized again"


def test_other_weights_in_a_bake_stay(engine_copy: Path) -> None:
    bake = write_bake(engine_copy, NOW - 2000)
    (bake / "mine.safetensors").write_bytes(b"mine")
    (finding,) = [f for f in found(engine_copy) if f.kind == "bake"]
    assert finding.remove is not None
    os.utime(bake / "mine.safetensors", (1, 1))
    finding.remove()
    assert [p.name for p in bake.iterdir()] == ["mine.safetensors"]


def test_links_are_not_followed(engine_copy: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(engine_copy, elsewhere)
    engine_copy.symlink_to(elsewhere, target_is_directory=True)
    assert engine_folders(engine_copy.parent) == []
    assert found(engine_copy, "0" * 64) == []
    engine_copy.unlink()
    engine_copy.mkdir()
    for path in elsewhere.iterdir():
        (engine_copy / path.name).symlink_to(path)
    assert found(engine_copy, "0" * 64) == []


def engines_of_ages(engine_dir: Path, *ages: float) -> list[Path]:
    folders = []
    for index, seconds in enumerate(ages):
        folder = engine_dir.parent / f"engine{index}"
        shutil.copytree(engine_dir, folder)
        age(folder, seconds)
        folders.append(folder)
    shutil.rmtree(engine_dir)
    return folders


def test_a_quota_takes_what_was_used_longest_ago(engine_copy: Path) -> None:
    size = cleanup.engine_finding(engine_copy, "").bytes
    a, b, _c = engines_of_ages(engine_copy, NOW - 50, NOW - 90, NOW - 10)
    root = engine_copy.parent
    assert evict([root], [], 3 * size) == []
    assert [f.path for f in evict([root], [], 3 * size - 1)] == [b]
    assert [f.path for f in evict([root], [], size)] == [b, a]
    assert len(evict([root], [], 0)) == 3
    (b / "last_used").touch()
    os.utime(b / "last_used", (NOW, NOW))
    assert [f.path for f in evict([root], [], 2 * size)] == [a]


def test_a_quota_counts_what_goes_anyway(engine_copy: Path) -> None:
    size = cleanup.engine_finding(engine_copy, "").bytes
    old = engine_copy / "double_blocks.0-0123456789ab.plan"
    old.write_bytes(b"x" * 1000)
    unneeded = found(engine_copy)
    assert evict([engine_copy.parent], unneeded, size) == []
    assert len(evict([engine_copy.parent], unneeded, size - 1)) == 1
    stale = found(engine_copy, "0" * 64)
    assert evict([engine_copy.parent], stale, 0) == []


def test_a_quota_takes_bakes_as_well(engine_copy: Path) -> None:
    bake = write_bake(engine_copy, 1000)
    (finding,) = evict([engine_copy.parent], [], cleanup.engine_finding(engine_copy, "").bytes)
    assert finding.path == bake
