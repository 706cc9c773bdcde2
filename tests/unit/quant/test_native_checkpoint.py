"""Writing the native file; that ComfyUI reads it is tested in tests/comfy."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from flux_fp4.quant.errors.export import NativeCheckpointError, NativeTargetError
from flux_fp4.quant.errors.files import DiskFullError
from flux_fp4.quant.native_checkpoint import save_native_checkpoint
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.safetensors_header import read_header
from flux_fp4.quant.sources.source import open_source
from mixed_checkpoint import linears_in_plans, save_mixed
from safetensors import safe_open
from tiny_flux import TINY, TINY_FLUX2, ignore_progress, random_flux

CONFIGS = {"flux1": TINY, "flux2": TINY_FLUX2}
LINEAR = "single_blocks.1.linear1"


def quantized(
    folder: Path, changes: Mapping[str, str] | None = None, config: str = "flux1", seed: int = 0
) -> QuantizedCheckpoint:
    """A checkpoint with every block Linear in NVFP4 but for the changes."""
    model = random_flux(CONFIGS[config], seed)
    formats = dict.fromkeys(linears_in_plans(model), "nvfp4") | dict(changes or {})
    return save_mixed(model, folder / f"q{seed}" / f"q{seed}.safetensors", formats)


def load(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("config", CONFIGS)
def test_native_file_reads_back_to_the_byte(tmp_path: Path, config: str) -> None:
    checkpoint = quantized(tmp_path, config=config)
    save_native_checkpoint(checkpoint, tmp_path / "native.safetensors", ignore_progress)
    source = open_source(tmp_path / "native.safetensors")
    assert source.layout == "comfyui-nvfp4"
    for linear in linears_in_plans(random_flux(CONFIGS[config])):
        packed = source.packed(linear)
        assert packed is not None
        assert same_bytes(packed.packed, checkpoint.load(f"{linear}.weight"))
        assert same_bytes(packed.block_scale, checkpoint.load(f"{linear}.weight_scale"))
        assert same_bytes(packed.global_scale, checkpoint.load(f"{linear}.weight_scale_2"))


def test_everything_else_is_copied_but_attention_scales(tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path, {LINEAR: "bf16"})
    save_native_checkpoint(checkpoint, tmp_path / "native.safetensors", ignore_progress)
    before, after = load(checkpoint.path), load(tmp_path / "native.safetensors")
    absent = before.keys() - after.keys()
    assert absent == {name for name in before if ".attention." in name}
    added = after.keys() - before.keys()
    assert {name.rpartition(".")[2] for name in added} == {"comfy_quant"}
    assert f"{LINEAR}.comfy_quant" not in added
    converted = {name.removesuffix("comfy_quant") for name in added}
    for name in before.keys() & after.keys():
        start, _, part = name.rpartition(".")
        if f"{start}." not in converted or part not in ("weight", "weight_scale"):
            assert same_bytes(before[name], after[name]), name


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("fp8", "FP8 with a scale per row"),
        ("nvfp4-awq", "scales its inputs"),
        ("nvfp4-svdquant", "low-rank branch"),
    ],
)
def test_what_comfyui_does_not_know_is_refused(tmp_path: Path, kind: str, reason: str) -> None:
    checkpoint = quantized(tmp_path, {LINEAR: kind})
    with pytest.raises(NativeCheckpointError, match=reason) as caught:
        save_native_checkpoint(checkpoint, tmp_path / "native.safetensors", ignore_progress)
    assert caught.value.linear == LINEAR
    assert "'nvfp4-max'" in str(caught.value)
    assert not (tmp_path / "native.safetensors").exists()


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_file_of_another_program_is_left_alone(tmp_path: Path, content: bytes) -> None:
    target = tmp_path / "flux1-dev.safetensors"
    target.write_bytes(content)
    with pytest.raises(NativeTargetError, match=r"flux1-dev\.safetensors"):
        save_native_checkpoint(quantized(tmp_path), target, ignore_progress)
    assert target.read_bytes() == content


def test_safetensors_file_of_another_program_is_left_alone(tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path)
    target = tmp_path / "copy.safetensors"
    shutil.copy(checkpoint.path, target)
    with pytest.raises(NativeTargetError):
        save_native_checkpoint(checkpoint, target, ignore_progress)
    assert target.read_bytes() == checkpoint.path.read_bytes()


def test_file_that_is_up_to_date_is_not_written_again(tmp_path: Path) -> None:
    checkpoint = quantized(tmp_path)
    target = tmp_path / "native.safetensors"
    save_native_checkpoint(checkpoint, target, ignore_progress)
    state = target.stat()
    save_native_checkpoint(checkpoint, target, ignore_progress)
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (state.st_ino, state.st_mtime_ns)


def test_own_file_of_an_older_checkpoint_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "native.safetensors"
    save_native_checkpoint(quantized(tmp_path), target, ignore_progress)
    newer = quantized(tmp_path, seed=1)
    save_native_checkpoint(newer, target, ignore_progress)
    assert read_header(target).metadata["flux_fp4_native"] == newer.metadata.content_digest


@pytest.mark.parametrize("after", [0, 3, 14])
def test_cancel_leaves_nothing_behind(tmp_path: Path, after: int) -> None:
    checkpoint = quantized(tmp_path)
    beats = 0

    def cancel(phase: str, done: int, total: int) -> None:
        nonlocal beats
        if beats == after:
            raise KeyboardInterrupt
        beats += 1

    with pytest.raises(KeyboardInterrupt):
        save_native_checkpoint(checkpoint, tmp_path / "out" / "native.safetensors", cancel)
    assert not list((tmp_path / "out").iterdir())


def test_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = quantized(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError) as caught:
        save_native_checkpoint(checkpoint, tmp_path / "out" / "n.safetensors", ignore_progress)
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.undo()
    save_native_checkpoint(checkpoint, tmp_path / "n.safetensors", ignore_progress)
    assert (tmp_path / "n.safetensors").stat().st_size == caught.value.needed_bytes
