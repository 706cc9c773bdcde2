"""Real builds with TensorRT-RTX on the CPU."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_PROFILE, SMALL_SPEC, silent
from flux_fp4.trt_runtime import plan_build
from flux_fp4.trt_runtime.backend import Backend, load_backend
from flux_fp4.trt_runtime.builder import BlockFormats, build_engine, check_formats
from flux_fp4.trt_runtime.digest import digest_of_file
from flux_fp4.trt_runtime.errors.build import (
    BuildSpecError,
    EngineLintError,
    FormatTargetError,
    PlanBuildError,
)
from flux_fp4.trt_runtime.manifest import MANIFEST, UNFINISHED, load_manifest
from flux_fp4.trt_runtime.plan_build import plan_key, profile_shapes
from flux_fp4.trt_runtime.resources import AUTOMATIC
from flux_fp4.trt_runtime.signature import read_signature
from flux_fp4.trt_runtime.spec import BuildSpec


class Recorder:
    """Progress that remembers what it was told and when."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.times: list[float] = []

    def __call__(self, phase: str, done: int, total: int) -> None:
        self.calls.append((phase, done, total))
        self.times.append(time.monotonic())

    def built(self) -> list[str]:
        return [phase.removeprefix("Built ") for phase, _, _ in self.calls if "Built" in phase]


def plan_times(engine_dir: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in engine_dir.glob("*.plan")}


def test_manifest_describes_the_built_plans(built_folder: Path) -> None:
    engine_dir = built_folder / "sm120"
    manifest = load_manifest(engine_dir)
    assert [entry.block for entry in manifest.blocks] == ["double_blocks.0", "single_blocks.0"]
    double, single = manifest.blocks
    assert (double.fp4_gemms_expected, double.fp4_gemms_found) == (8, 8)
    assert (single.fp4_gemms_expected, single.fp4_gemms_found) == (2, 2)
    for entry in manifest.blocks:
        plan = engine_dir / entry.file
        assert (entry.fp8_mha_expected, entry.fp8_mha_found) == (1, 1)
        assert plan.stat().st_size == entry.bytes
        assert digest_of_file(plan) == entry.digest
        assert entry.activation_bytes > 0
    assert manifest.spec == SMALL_SPEC
    assert manifest.backend_version == load_backend("tensorrt_rtx").version
    assert (manifest.checkpoint_digest, manifest.recipe) == ("c0ffee", "nvfp4-max")
    files = {p.name for p in engine_dir.iterdir()}
    assert files == {"manifest.json", "build.lock", *(e.file for e in manifest.blocks)}


def test_finished_plans_are_reused(engine_copy: Path) -> None:
    before = plan_times(engine_copy)
    progress = Recorder()
    build_engine(engine_copy.parent, SMALL_SPEC, progress)
    assert progress.built() == []
    assert progress.calls[-1] == ("Checking single_blocks.0", 1, 2)
    assert plan_times(engine_copy) == before


def test_leftovers_of_a_killed_build_are_removed(engine_copy: Path) -> None:
    leftover = engine_copy / ".single_blocks.0-0123456789ab.plan.4711.tmp"
    leftover.write_bytes(b"half")
    build_engine(engine_copy.parent, SMALL_SPEC, silent)
    assert not leftover.exists()


def test_changed_weight_byte_rebuilds_only_its_block(engine_copy: Path) -> None:
    folder = engine_copy.parent
    (first, *_) = read_signature(folder / "single_blocks.0.onnx").ranges
    weights = folder / "tiny.safetensors"
    data = bytearray(weights.read_bytes())
    data[first.offset] ^= 1
    weights.write_bytes(data)
    progress = Recorder()
    manifest = build_engine(folder, SMALL_SPEC, progress)
    assert progress.built() == ["single_blocks.0"]
    # the plan of the old weights is gone, the other one stays
    assert set(plan_times(engine_copy)) == {entry.file for entry in manifest.blocks}


def test_damaged_plan_is_built_again(engine_copy: Path) -> None:
    entry = load_manifest(engine_copy).blocks[1]
    plan = engine_copy / entry.file
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    progress = Recorder()
    manifest = build_engine(engine_copy.parent, SMALL_SPEC, progress)
    assert progress.built() == ["single_blocks.0"]
    assert digest_of_file(plan) == manifest.blocks[1].digest


def test_key_depends_on_everything_that_decides_the_plan() -> None:
    backend = Backend("tensorrt_rtx", "1.7", None, True, True)
    keys = {
        plan_key("o", "w", backend, SMALL_SPEC),
        plan_key("o2", "w", backend, SMALL_SPEC),
        plan_key("o", "w2", backend, SMALL_SPEC),
        plan_key("o", "w", replace(backend, version="1.8"), SMALL_SPEC),
        plan_key("o", "w", replace(backend, name="tensorrt"), SMALL_SPEC),
        plan_key("o", "w", backend, replace(SMALL_SPEC, targets=("sm121",))),
        plan_key(
            "o", "w", backend, replace(SMALL_SPEC, profile=replace(SMALL_PROFILE, max_batch=3))
        ),
    }
    assert len(keys) == 7


def test_profile_covers_every_dynamic_input(built_folder: Path) -> None:
    shapes = profile_shapes(read_signature(built_folder / "double_blocks.0.onnx"), SMALL_PROFILE)
    assert shapes["img"] == ((1, 32, 128), (1, 64, 128), (2, 256, 128))
    assert shapes["txt"] == ((1, 1, 128), (1, 16, 128), (2, 32, 128))
    assert shapes["cos"] == ((1, 33, 32), (1, 80, 32), (2, 288, 32))
    assert shapes["txt_mod2_gate"] == ((1, 1, 128), (1, 1, 128), (2, 1, 128))
    assert len(shapes) == 16


@pytest.mark.parametrize("fp8", [(), ("linear2",)], ids=["FP4", "FP8"])
def test_weight_only_quantization_makes_the_build_fail(
    blocks: Callable[..., Path], fp8: tuple[str, ...]
) -> None:
    folder = blocks(depth=0, fp8=fp8, weight_only=("linear2",))
    with pytest.raises(EngineLintError) as caught:
        build_engine(folder, SMALL_SPEC, silent)
    assert caught.value.block == "single_blocks.0"
    assert caught.value.linears == ("linear2",)
    assert list((folder / "sm120").glob("*.plan")) == []


def test_refused_graph_names_block_and_reason(blocks: Callable[..., Path]) -> None:
    folder = blocks(depth=0)
    path = folder / "single_blocks.0.onnx"
    path.write_bytes(path.read_bytes().replace(b"LayerNormalization", b"LayerNormalizatioX"))
    with pytest.raises(PlanBuildError, match="LayerNormalizatioX") as caught:
        build_engine(folder, SMALL_SPEC, silent)
    assert caught.value.block == "single_blocks.0"


def test_blocks_without_fp8_attention_build(blocks: Callable[..., Path]) -> None:
    folder = blocks(depth=0, fp8_attention=False)
    (entry,) = build_engine(folder, SMALL_SPEC, silent).blocks
    assert (entry.fp8_mha_expected, entry.fp8_mha_found) == (0, 0)


def test_formats_are_counted_apart(blocks: Callable[..., Path]) -> None:
    folder = blocks(depth_single=0, fp8=("img_attn.qkv", "txt_mlp.2"))
    (entry,) = build_engine(folder, SMALL_SPEC, silent).blocks
    assert (entry.fp4_gemms_expected, entry.fp4_gemms_found) == (6, 6)
    assert (entry.fp8_gemms_expected, entry.fp8_gemms_found) == (2, 2)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (BuildSpec(targets=("sm89",)), "'sm89'.*NVFP4.*recipe 'fp8'"),
        (BuildSpec(targets=("sm120", "sm86")), "'sm86'.*NVFP4.*recipe 'bf16'"),
        (BuildSpec(profile=replace(SMALL_PROFILE, min_img_tokens=30)), "at least 32"),
    ],
    ids=["target without FP4", "one target without FP8", "profile below FP8 attention"],
)
def test_specs_that_lose_precision_are_refused_before_building(
    engine_copy: Path, spec: BuildSpec, match: str
) -> None:
    with pytest.raises((BuildSpecError, FormatTargetError), match=match):
        build_engine(engine_copy.parent, spec, silent)


ALL_SINGLE = ("linear1", "linear2")


def test_fp8_builds_for_the_first_generation_that_has_it(blocks: Callable[..., Path]) -> None:
    folder = blocks(depth=0, fp8=ALL_SINGLE)
    (entry,) = build_engine(folder, replace(SMALL_SPEC, targets=("sm89",)), silent).blocks
    assert (entry.fp8_gemms_found, entry.fp8_mha_found) == (2, 1)
    with pytest.raises(FormatTargetError, match=r"FP8 weights.*sm89 or newer.*recipe 'bf16'"):
        build_engine(folder, replace(SMALL_SPEC, targets=("sm86",)), silent)


@pytest.mark.parametrize(
    ("sm", "fp8_attention", "match"),
    [
        ("sm86", True, "switch off 'fp8 attention'"),
        ("sm75", False, "sm80 or newer"),
        ("sm86", False, None),
    ],
    ids=["FP8 attention", "bf16 before Ampere", "bf16"],
)
def test_targets_of_high_precision_blocks(sm: str, fp8_attention: bool, match: str | None) -> None:
    formats = BlockFormats("single_blocks.0", False, False, fp8_attention, "bf16")
    with contextlib.ExitStack() as stack:
        if match:
            stack.enter_context(pytest.raises((BuildSpecError, FormatTargetError), match=match))
        check_formats(sm, formats)


def test_two_targets_in_one_plan(blocks: Callable[..., Path]) -> None:
    folder = blocks(depth=0)
    manifest = build_engine(folder, replace(SMALL_SPEC, targets=("sm121", "sm120")), silent)
    assert manifest.targets == ("sm120", "sm121")
    assert (folder / "sm120+sm121" / manifest.blocks[0].file).is_file()


def test_progress_is_called_every_tenth_of_a_second(blocks: Callable[..., Path]) -> None:
    progress = Recorder()
    build_engine(blocks(depth_single=0), SMALL_SPEC, progress)
    gaps = [b - a for a, b in zip(progress.times, progress.times[1:], strict=False)]
    assert len(gaps) >= 5
    # 0.1 s by design; the bound leaves room for a busy machine
    assert max(gaps) < 0.5


def test_two_builds_of_one_engine_share_the_work(blocks: Callable[..., Path]) -> None:
    folder = blocks(depth=0, depth_single=2)
    first, second = Recorder(), Recorder()
    threads = [
        threading.Thread(target=build_engine, args=(folder, SMALL_SPEC, progress))
        for progress in (first, second)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(first.built() + second.built()) == ["single_blocks.0", "single_blocks.1"]
    assert any("Waiting" in phase for phase, _, _ in first.calls + second.calls)
    load_manifest(folder / "sm120")


def test_two_workers_build_the_same_plans(engine_copy: Path) -> None:
    one = load_manifest(engine_copy)
    (engine_copy / "manifest.json").unlink()
    for plan in engine_copy.glob("*.plan"):
        plan.unlink()
    progress = Recorder()
    two = build_engine(engine_copy.parent, SMALL_SPEC, progress, workers=2)
    assert any("double_blocks.0, single_blocks.0" in phase for phase, _, _ in progress.calls)
    assert [e.key for e in one.blocks] == [e.key for e in two.blocks]


def test_first_block_is_built_while_others_are_checked(blocks: Callable[..., Path]) -> None:
    progress = Recorder()
    build_engine(blocks(depth=1, depth_single=2), SMALL_SPEC, progress)
    phases = [phase for phase, _, _ in progress.calls]
    building = phases.index("Building double_blocks.0")
    assert phases.index("Checking double_blocks.0") < building
    assert building < phases.index("Checking single_blocks.0")
    assert progress.built() == ["double_blocks.0", "single_blocks.0", "single_blocks.1"]


def test_cancelled_build_keeps_plans_that_it_did_not_come_to(blocks: Callable[..., Path]) -> None:
    class Cancelled(BaseException):
        pass

    def cancel_after_first(phase: str, done: int, total: int) -> None:
        if phase.startswith("Built"):
            raise Cancelled

    folder = blocks(depth=1, depth_single=2)
    engine_dir = folder / SMALL_SPEC.folder_name
    last = build_engine(folder, SMALL_SPEC, silent).blocks[-1]
    content = json.loads((engine_dir / MANIFEST).read_text())
    content["blocks"] = content["blocks"][-1:]
    (engine_dir / UNFINISHED).write_text(json.dumps(content))
    (engine_dir / MANIFEST).unlink()
    with pytest.raises(Cancelled):
        build_engine(folder, SMALL_SPEC, cancel_after_first)
    progress = Recorder()
    manifest = build_engine(folder, SMALL_SPEC, progress)
    assert progress.built() == ["single_blocks.0"]
    assert manifest.blocks[-1] == last


def test_automatic_number_of_workers_is_that_of_the_machine(
    blocks: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(plan_build, "automatic_workers", lambda size: asked.append(size) or 2)
    progress = Recorder()
    folder = blocks(depth=1, depth_single=1)
    build_engine(folder, SMALL_SPEC, progress, workers=AUTOMATIC)
    assert any("double_blocks.0, single_blocks.0" in phase for phase, _, _ in progress.calls)
    ranges = read_signature(folder / "double_blocks.0.onnx").ranges
    assert asked == [sum(entry.length for entry in ranges)]
    with pytest.raises(BuildSpecError, match="-1 build processes"):
        build_engine(folder, SMALL_SPEC, silent, workers=-1)


def test_rebuild_keeps_the_old_engine_until_it_is_complete(engine_copy: Path) -> None:
    class Cancelled(BaseException):
        pass

    def cancel_after_first(phase: str, done: int, total: int) -> None:
        if phase.startswith("Built"):
            raise Cancelled

    before = (engine_copy / "manifest.json").read_bytes()
    plans = plan_times(engine_copy)
    larger = replace(SMALL_SPEC, profile=replace(SMALL_PROFILE, max_img_tokens=512))
    with pytest.raises(Cancelled):
        build_engine(engine_copy.parent, larger, cancel_after_first)
    assert (engine_copy / "manifest.json").read_bytes() == before
    assert plans.items() <= plan_times(engine_copy).items()
    progress = Recorder()
    manifest = build_engine(engine_copy.parent, larger, progress)
    assert progress.built() == ["single_blocks.0"]
    assert set(plan_times(engine_copy)) == {entry.file for entry in manifest.blocks}


def test_unreadable_manifest_is_replaced_by_a_new_build(engine_copy: Path) -> None:
    (engine_copy / "manifest.json").write_text(json.dumps({"blocks": "?"}))
    progress = Recorder()
    build_engine(engine_copy.parent, SMALL_SPEC, progress)
    assert progress.built() == ["double_blocks.0", "single_blocks.0"]
    load_manifest(engine_copy)
