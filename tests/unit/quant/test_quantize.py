from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flux_fp4.quant.errors.files import CheckpointBusyError, DiskFullError, QuantizedCheckpointError
from flux_fp4.quant.nvfp4 import quantize_weight
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint, is_in_plan
from flux_fp4.quant.recipe import QuantizeOptions
from flux_fp4.quant.sources.source import open_source
from quantize_tiny import quantize, with_recipe
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_flux import TINY, random_flux, random_samples, save_flux


class Cancelled(BaseException):
    """As ComfyUI's interrupt, not an Exception."""


def test_every_block_linear_is_packed_and_everything_else_kept(
    source: Path, quantized: QuantizedCheckpoint
) -> None:
    before, after = load_file(source), load_file(quantized.path)
    packed = {name.removesuffix("_scale") for name in after if name.endswith(".weight_scale")}
    assert len(packed) == 8 * TINY.depth + 2 * TINY.depth_single_blocks
    for name, tensor in before.items():
        if name in packed:
            expected = quantize_weight(tensor, name)
            assert torch.equal(after[name], expected.packed), name
            assert torch.equal(after[f"{name}_scale_2"], expected.global_scale), name
        else:
            assert torch.equal(after[name], tensor), name
            assert (
                ".lin." in name
                or "_norm." in name
                or name.endswith(".bias")
                or "blocks" not in name
            )


def test_report_matches_the_tensors(source: Path, quantized: QuantizedCheckpoint) -> None:
    metadata = quantized.metadata
    assert [report.name for report in metadata.blocks] == list(TINY.block_names)
    before = load_file(source)
    for report in metadata.linears:
        scale = quantized.load(f"{report.name}.input_scale")
        assert scale.item() == pytest.approx(1.25 * report.input_amax / 2688, rel=1e-6)
        assert 15 < report.output_sqnr_db < 30, f"{report.name}: {report.output_sqnr_db:.1f} dB"
        assert f"{report.name}.weight" in before
    for block in metadata.blocks:
        assert 10 < block.update_sqnr_db < 30, f"{block.name}: {block.update_sqnr_db:.1f} dB"
    assert metadata.source_digest == open_source(source).digest()
    assert metadata.calibration_digest == random_samples().digest()
    assert metadata.variant == "flux1-dev"


def test_input_amax_is_the_largest_seen_over_all_samples(
    source: Path, quantized: QuantizedCheckpoint
) -> None:
    from flux_fp4.quant.calibration import embedded_samples

    model = random_flux()
    model.load_state_dict(load_file(source))
    seen = []
    linear = model.double_blocks[0].txt_attn.qkv
    linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].abs().max()))
    with torch.no_grad():
        for state in embedded_samples(random_samples(), model, TINY):
            block = model.double_blocks[0]
            block(state.img, state.txt, state.cos, state.sin, block.modulation_vectors(state.vec))
    (report,) = [
        entry
        for entry in quantized.metadata.linears
        if entry.name == "double_blocks.0.txt_attn.qkv"
    ]
    assert report.input_amax == pytest.approx(max(seen).item(), rel=1e-6)


def test_attention_scales_cover_the_largest_q_k_and_v_with_headroom(
    source: Path, quantized: QuantizedCheckpoint
) -> None:
    from flux_fp4.quant.calibration import embedded_samples

    model = random_flux()
    model.load_state_dict(load_file(source))
    block = model.double_blocks[0]
    seen: list[list[float]] = []

    def observe(module: torch.nn.Module, qkv: tuple[torch.Tensor, ...]) -> None:
        seen.append([tensor.abs().max().item() for tensor in qkv])

    block.attention.register_forward_pre_hook(observe)
    with torch.no_grad():
        for state in embedded_samples(random_samples(), model, TINY):
            block(state.img, state.txt, state.cos, state.sin, block.modulation_vectors(state.vec))
    # the plan multiplies q and k by head_dim ** -0.25 before it quantizes them
    factors = {"q": 128**-0.25, "k": 128**-0.25, "v": 1.0}
    for (part, factor), values in zip(factors.items(), zip(*seen, strict=True), strict=True):
        scale = quantized.load(f"double_blocks.0.attention.{part}_scale").item()
        needed = 1.25 * factor * max(values) / 448
        assert needed * (1 - 1e-6) <= scale <= needed * (1 + 2**-7), part


def test_file_is_plain_safetensors_with_aligned_tensors(quantized: QuantizedCheckpoint) -> None:
    with safe_open(quantized.path, framework="pt") as file:
        assert set(file.keys()) == set(quantized.tensors)
    sizes = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
    for name, place in quantized.tensors.items():
        assert place.offset % sizes[place.dtype] == 0, name


def test_quantizing_again_gives_the_same_bytes(
    source: Path, quantized: QuantizedCheckpoint, tmp_path: Path
) -> None:
    again = quantize(source, tmp_path / "again.safetensors")
    assert again.path.read_bytes() == quantized.path.read_bytes()


def test_prefixed_fp32_checkpoint_quantizes_from_its_own_values(tmp_path: Path) -> None:
    model = random_flux(seed=3)
    path = save_flux(model, tmp_path / "full.safetensors", "model.diffusion_model.", torch.float32)
    result = quantize(path, tmp_path / "q.safetensors")
    name = "single_blocks.1.linear2.weight"
    expected = quantize_weight(model.state_dict()[name], name)
    assert torch.equal(result.load(name), expected.packed)
    assert result.load("img_in.weight").dtype == torch.bfloat16


def test_without_fp8_attention_no_attention_scales_are_written(
    source: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions(fp8_attention=False)
    result = quantize(source, tmp_path / "q.safetensors", options)
    assert not [name for name in result.tensors if ".attention." in name]


def test_high_precision_state_dict_is_all_that_no_plan_holds(
    quantized: QuantizedCheckpoint,
) -> None:
    state = quantized.high_precision_state_dict()
    assert "double_blocks.0.img_mod.lin.weight" in state
    assert "final_layer.linear.bias" in state
    assert not any(is_in_plan(name) for name in state)
    assert "single_blocks.0.linear1.bias" not in state


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


class CancelAfter:
    """A progress callback that interrupts as ComfyUI does, and remembers what it heard."""

    def __init__(self, calls: int) -> None:
        self.left = calls
        self.phases: list[str] = []

    def __call__(self, phase: str, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise Cancelled
        self.phases.append(phase)


class CancelAt(CancelAfter):
    """Interrupts when a phase begins."""

    def __init__(self, phase: str) -> None:
        super().__init__(0)
        self.phase = phase

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase == self.phase:
            raise Cancelled
        super().__call__(phase, done, total)


def test_cancelled_anywhere_it_goes_on_and_ends_in_the_same_bytes(
    source: Path, quantized: QuantizedCheckpoint, tmp_path: Path
) -> None:
    destination, statistics = tmp_path / "q" / "q.safetensors", tmp_path / "statistics"
    destination.parent.mkdir()
    destination.write_bytes(b"old")
    for _ in range(100):
        # three calls further each time; a run that began anew would never come to its end
        progress = CancelAfter(4 * len(random_samples().samples))
        with pytest.raises(Cancelled):
            quantize(source, destination, progress=progress, statistics=statistics)
        assert destination.read_bytes() == b"old"
        assert visible(destination.parent) == ["q.safetensors"]
        if any(phase.startswith("Quantizing") for phase in progress.phases):
            break
    for block in TINY.block_names[1:]:
        progress = CancelAt(f"Quantizing {block}")
        with pytest.raises(Cancelled):
            quantize(source, destination, progress=progress, statistics=statistics)
        assert (
            f"Quantizing {TINY.block_names[0]}" not in progress.phases
            or block == TINY.block_names[1]
        )
    result = quantize(source, destination, statistics=statistics)
    assert result.path.read_bytes() == quantized.path.read_bytes()
    assert visible(destination.parent) == ["q.safetensors"]
    assert not list(destination.parent.glob(".*.partial"))


def test_statistics_of_finished_blocks_are_not_collected_again(
    source: Path, tmp_path: Path
) -> None:
    statistics = tmp_path / "statistics"
    samples = len(random_samples().samples)
    cancel = CancelAfter(2 + 2 * samples + 1)  # embedding, two blocks, and a part of the third
    with pytest.raises(Cancelled):
        quantize(source, tmp_path / "a.safetensors", progress=cancel, statistics=statistics)
    (folder,) = statistics.iterdir()
    first, second = (folder / f"{name}.safetensors" for name in TINY.block_names[:2])
    before = [path.stat().st_mtime_ns for path in (first, second)]
    heard = CancelAfter(0)
    quantize(source, tmp_path / "a.safetensors", progress=heard, statistics=statistics)
    assert [path.stat().st_mtime_ns for path in (first, second)] == before
    assert f"Passing {TINY.block_names[1]}" in heard.phases
    assert f"Calibrating {TINY.block_names[2]}" in heard.phases
    heard = CancelAfter(0)
    quantize(
        source,
        tmp_path / "b.safetensors",
        with_recipe("nvfp4-mse"),
        progress=heard,
        statistics=statistics,
    )
    assert not [phase for phase in heard.phases if not phase.startswith(("Quant", "Copying"))]


def test_damaged_part_of_an_unfinished_file_is_made_again(
    source: Path, quantized: QuantizedCheckpoint, tmp_path: Path
) -> None:
    destination, statistics = tmp_path / "q.safetensors", tmp_path / "statistics"
    quantize(source, tmp_path / "other.safetensors", statistics=statistics)
    with pytest.raises(Cancelled):
        quantize(
            source,
            destination,
            progress=CancelAt(f"Quantizing {TINY.block_names[1]}"),
            statistics=statistics,
        )
    partial = tmp_path / ".q.partial"
    content = bytearray(partial.read_bytes())
    spoiled = quantized.tensors[f"{TINY.block_names[0]}.img_attn.qkv.weight"]
    content[spoiled.offset + 100] ^= 1
    partial.write_bytes(content)
    heard = CancelAfter(0)
    result = quantize(source, destination, progress=heard, statistics=statistics)
    assert result.path.read_bytes() == quantized.path.read_bytes()


def test_other_options_do_not_take_up_unfinished_work(source: Path, tmp_path: Path) -> None:
    destination, statistics = tmp_path / "q.safetensors", tmp_path / "statistics"
    quantize(source, tmp_path / "other.safetensors", statistics=statistics)
    with pytest.raises(Cancelled):
        quantize(
            source,
            destination,
            progress=CancelAt(f"Quantizing {TINY.block_names[1]}"),
            statistics=statistics,
        )
    assert (tmp_path / ".q.partial").is_file()
    options = QuantizeOptions(headroom=2.0)
    result = quantize(source, destination, options, statistics=statistics)
    fresh = quantize(source, tmp_path / "fresh.safetensors", options, statistics=statistics)
    assert result.path.read_bytes() == fresh.path.read_bytes()


def test_two_processes_do_not_write_one_checkpoint(source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "q.safetensors"

    def second(phase: str, done: int, total: int) -> None:
        if phase.startswith("Quantizing"):
            with pytest.raises(CheckpointBusyError, match="written by another process"):
                quantize(source, destination)
            raise Cancelled

    with pytest.raises(Cancelled):
        quantize(source, destination, progress=second)


def test_full_disk_is_foreseen_before_calibration(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    heard = CancelAfter(0)
    with pytest.raises(DiskFullError) as caught:
        quantize(source, tmp_path / "q.safetensors", progress=heard)
    assert caught.value.free_bytes == 1000
    assert caught.value.needed_bytes > 1_000_000
    assert not heard.phases
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_while_writing_is_a_clear_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if (tmp_path / ".q.partial").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskFullError):
        quantize(source, tmp_path / "q.safetensors", statistics=tmp_path / "statistics")
    assert visible(tmp_path) == ["statistics"]
    assert not list(tmp_path.glob(".*.partial"))


def test_was_made_from_tells_other_inputs_apart(
    source: Path, quantized: QuantizedCheckpoint
) -> None:
    model, samples = open_source(source).digest(), random_samples().digest()
    options = QuantizeOptions()
    assert quantized.was_made_from(model, options, samples)
    assert not quantized.was_made_from(samples, options, samples)
    assert not quantized.was_made_from(model, options, random_samples(seed=1).digest())
    for change in ({"fp8_attention": False}, {"modulation": "fp8"}, {"headroom": 1.0}):
        assert not quantized.was_made_from(model, QuantizeOptions(**change), samples)


def test_source_checkpoint_is_no_quantized_checkpoint(source: Path) -> None:
    with pytest.raises(QuantizedCheckpointError, match="no 'flux_fp4' entry"):
        QuantizedCheckpoint.read(source)


def test_truncated_quantized_checkpoint_is_refused(
    quantized: QuantizedCheckpoint, tmp_path: Path
) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(quantized.path.read_bytes()[:-1])
    with pytest.raises(QuantizedCheckpointError, match="cannot be read"):
        QuantizedCheckpoint.read(path)
