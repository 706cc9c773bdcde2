from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flux_fp4.quant import checkpoint_writer
from flux_fp4.quant.errors import DiskFullError, QuantizedCheckpointError, UnknownCheckpointError
from flux_fp4.quant.nvfp4 import quantize_weight
from flux_fp4.quant.quantize import file_digest, quantize_checkpoint
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint, is_in_plan
from flux_fp4.quant.recipe import QuantizeOptions
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_flux import TINY, ignore_progress, random_flux, random_samples, save_flux


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
    assert metadata.source_digest == file_digest(source)
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
    again = quantize_checkpoint(
        source, tmp_path / "again.safetensors", random_samples(), QuantizeOptions(), ignore_progress
    )
    assert again.path.read_bytes() == quantized.path.read_bytes()


def test_prefixed_fp32_checkpoint_quantizes_from_its_own_values(tmp_path: Path) -> None:
    model = random_flux(seed=3)
    path = save_flux(model, tmp_path / "full.safetensors", "model.diffusion_model.", torch.float32)
    result = quantize_checkpoint(
        path, tmp_path / "q.safetensors", random_samples(), QuantizeOptions(), ignore_progress
    )
    name = "single_blocks.1.linear2.weight"
    expected = quantize_weight(model.state_dict()[name], name)
    assert torch.equal(result.load(name), expected.packed)
    assert result.load("img_in.weight").dtype == torch.bfloat16


def test_without_fp8_attention_no_attention_scales_are_written(
    source: Path, tmp_path: Path
) -> None:
    result = quantize_checkpoint(
        source,
        tmp_path / "q.safetensors",
        random_samples(),
        QuantizeOptions(fp8_attention=False),
        ignore_progress,
    )
    assert not [name for name in result.tensors if ".attention." in name]


def test_high_precision_state_dict_is_all_that_no_plan_holds(
    quantized: QuantizedCheckpoint,
) -> None:
    state = quantized.high_precision_state_dict()
    assert "double_blocks.0.img_mod.lin.weight" in state
    assert "final_layer.linear.bias" in state
    assert not any(is_in_plan(name) for name in state)
    assert "single_blocks.0.linear1.bias" not in state


@pytest.mark.parametrize("calls", [1, 4, 9])
def test_cancel_leaves_no_file_and_the_old_one_untouched(
    source: Path, tmp_path: Path, calls: int
) -> None:
    destination = tmp_path / "q.safetensors"
    destination.write_bytes(b"old")
    left = calls

    def cancel(phase: str, done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Cancelled

    with pytest.raises(Cancelled):
        quantize_checkpoint(source, destination, random_samples(), QuantizeOptions(), cancel)
    assert destination.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["q.safetensors"]


def test_full_disk_is_foreseen(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError) as caught:
        quantize_checkpoint(
            source, tmp_path / "q.safetensors", random_samples(), QuantizeOptions(), ignore_progress
        )
    assert caught.value.free_bytes == 1000
    assert caught.value.needed_bytes > 1_000_000
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_while_writing_is_a_clear_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, name: str, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "add", fail)
    with pytest.raises(DiskFullError):
        quantize_checkpoint(
            source, tmp_path / "q.safetensors", random_samples(), QuantizeOptions(), ignore_progress
        )
    assert not list(tmp_path.iterdir())


def test_was_made_from_tells_other_inputs_apart(
    source: Path, quantized: QuantizedCheckpoint
) -> None:
    size, digest = source.stat().st_size, random_samples().digest()
    options = QuantizeOptions()
    assert quantized.was_made_from(source.name, size, options, digest)
    assert not quantized.was_made_from("other.safetensors", size, options, digest)
    assert not quantized.was_made_from(source.name, size + 1, options, digest)
    assert not quantized.was_made_from(source.name, size, options, random_samples(seed=1).digest())
    no_fp8 = QuantizeOptions(fp8_attention=False)
    assert not quantized.was_made_from(source.name, size, no_fp8, digest)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (4, 4)}, "it is a LoRA"),
        ({"transformer_blocks.0.attn.to_q.weight": (4, 4)}, "diffusers layout"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4)}, "T5 text encoder"),
        ({"decoder.conv_in.weight": (4, 4)}, "it is a VAE"),
        ({"model.embed.weight": (4, 4)}, "another kind of model"),
        ({"double_blocks.0.img_attn.qkv.weight": (4, 4)}, "it is incomplete"),
    ],
    ids=["lora", "diffusers", "t5", "vae", "unknown", "fragment"],
)
def test_other_files_are_refused_by_what_they_are(
    tensors: dict[str, tuple[int, ...]], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(UnknownCheckpointError, match=reason):
        quantize_checkpoint(
            path, tmp_path / "q.safetensors", random_samples(), QuantizeOptions(), ignore_progress
        )


def test_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.safetensors"
    path.write_text("<html>Sign in to download</html>")
    with pytest.raises(UnknownCheckpointError, match="cannot be read as safetensors"):
        quantize_checkpoint(
            path, tmp_path / "q.safetensors", random_samples(), QuantizeOptions(), ignore_progress
        )


@pytest.mark.parametrize("edit", ["missing", "surplus", "shape"])
def test_checkpoint_that_is_not_quite_flux_names_the_tensor(edit: str, tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in random_flux().state_dict().items()}
    if edit == "missing":
        del state["single_blocks.1.linear2.bias"]
        expected = "lacks 1 FLUX tensors.*single_blocks.1.linear2.bias"
    elif edit == "surplus":
        state["double_blocks.0.img_attn.adapter.weight"] = torch.zeros(2, 2)
        expected = "1 tensors unknown to FLUX.1.*adapter"
    else:
        state["txt_in.bias"] = torch.zeros(3).bfloat16()
        expected = r"'txt_in.bias' has shape \[3\], not \[256\]"
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UnknownCheckpointError, match=expected):
        quantize_checkpoint(
            tmp_path / "x.safetensors",
            tmp_path / "q.safetensors",
            random_samples(),
            QuantizeOptions(),
            ignore_progress,
        )


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
