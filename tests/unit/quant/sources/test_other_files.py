"""Files that are no FLUX transformer, or not a whole one: refused by what they are."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import diffusers_state, save_sharded, save_state, with_prefix
from flux_fp4.quant.errors.sources import DamagedCheckpointError, UnknownCheckpointError
from flux_fp4.quant.sources.source import open_source
from safetensors.torch import save, save_file

State = dict[str, torch.Tensor]

DOUBLE = "double_blocks.0.img_attn.qkv.weight"


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save({"img_in.weight": torch.zeros(2)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason", "next_step"),
    [
        (b"GGUF\x03\x00\x00\x00" + bytes(500), "it is a GGUF file", "bf16 or FP8 safetensors"),
        (pickled(), "it is a pickle file", "Choose the safetensors file"),
        (b"\x80\x02}q\x00(X\x01\x00", "it is a pickle file", "Choose the safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "it is a web page", "Download it again"),
        (b"\n  <html lang='en'>", "cannot be read as safetensors", "Download it again"),
    ],
    ids=["gguf", "torch-save", "old-pickle", "lfs", "doctype", "html"],
)
def test_other_formats(content: bytes, reason: str, next_step: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnknownCheckpointError, match=rf"'x.safetensors'.*{reason}.*{next_step}"):
        open_source(path)


def test_header_whose_length_looks_like_a_pickle_is_read(state: State, tmp_path: Path) -> None:
    # 0x10580: the length of a header of 66944 bytes begins with the bytes of a pickle
    base = len(save(state, {"x": ""})) - sum(value.nbytes for value in state.values()) - 8
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(save(state, {"x": "y" * (0x10580 - base)}))
    assert path.read_bytes()[:2] == b"\x80\x05"
    assert open_source(path).layout == "bfl"


@pytest.mark.parametrize(
    ("tensor", "reason", "next_step"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "LoRA", "Merge it"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "LoRA", "Merge it"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lokr_w1", "LoRA", "Merge it"),
        ("controlnet_blocks.0.weight", "a ControlNet", "'Load ControlNet Model'"),
        ("redux_up.weight", "FLUX Redux", "'Load Style Model'"),
        ("ip_adapter_proj_model.proj.weight", "an IP-adapter", "'Load Style Model'"),
        ("decoder.conv_in.weight", "a VAE", "'Load VAE'"),
        ("decoder.up_blocks.0.resnets.0.conv1.weight", "a VAE", "'Load VAE'"),
        (
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "a T5 text encoder",
            r"Load CLIP \(Dual\)",
        ),
        (
            "text_model.encoder.layers.0.self_attn.q_proj.weight",
            "a CLIP text",
            r"Load CLIP \(Dual\)",
        ),
        ("model.layers.0.self_attn.q_proj.weight", "a language model", "'Load CLIP'"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a UNet", "Choose a FLUX"),
        ("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight", "SD3", "Choose a FLUX"),
        ("model.diffusion_model.blocks.0.cross_attn.q.weight", "Wan", "Choose a FLUX"),
        ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image", "Choose a FLUX"),
        ("noise_refiner.0.attention.qkv.weight", "Z-Image", "Choose a FLUX"),
        ("transformer_blocks.0.qkv_proj.qweight", "Nunchaku", "bf16 or FP8"),
        ("model.embed.weight", "it holds no FLUX transformer", "Choose a FLUX"),
    ],
)
def test_other_models(tensor: str, reason: str, next_step: str, tmp_path: Path) -> None:
    path = save_state({tensor: torch.zeros(4, 4)}, tmp_path)
    with pytest.raises(UnknownCheckpointError, match=f"{reason}.*{next_step}"):
        open_source(path)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        ("controlnet_blocks.0.weight", "a ControlNet"),
        ("distilled_guidance_layer.in_proj.weight", "Chroma"),
        ("txt_in.individual_token_refiner.blocks.0.mlp.0.weight", "Hunyuan"),
        ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "an IP-adapter"),
        ("double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("double_blocks.0.img_mlp.gate_proj.weight", "Ovis-Image"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["plain", "prefix"])
def test_relatives_with_flux_blocks(tensor: str, reason: str, prefix: str, tmp_path: Path) -> None:
    tensors = {DOUBLE: torch.zeros(4, 4), tensor: torch.zeros(4, 4)}
    with pytest.raises(UnknownCheckpointError, match=reason):
        open_source(save_state(with_prefix(tensors, prefix), tmp_path))


def test_quantized_checkpoint_of_this_pack(state: State, tmp_path: Path) -> None:
    with pytest.raises(UnknownCheckpointError, match=r"already quantized it.*'Export FLUX FP4"):
        open_source(save_state(state, tmp_path, {"flux_fp4": "{}"}))


def test_single_shard_names_its_index(state: State, tmp_path: Path) -> None:
    index = save_sharded(diffusers_state(state), tmp_path)
    with pytest.raises(UnknownCheckpointError, match=f"one shard of several.*'{index.name}'"):
        open_source(tmp_path / "diffusion_pytorch_model-00001-of-00003.safetensors")


@pytest.mark.parametrize("edit", ["missing", "surplus", "shape", "config"])
def test_checkpoint_that_is_not_quite_flux_names_the_tensors(
    edit: str, state: State, tmp_path: Path
) -> None:
    state = dict(state)
    if edit == "missing":
        del state["single_blocks.1.linear2.bias"], state["single_blocks.0.linear2.bias"]
        expected = "lacks 2 FLUX tensors.*single_blocks.0.linear2.bias', 'single_blocks.1"
    elif edit == "surplus":
        state["double_blocks.0.img_attn.adapter.weight"] = torch.zeros(2, 2)
        expected = "1 tensors unknown to FLUX.*adapter"
    elif edit == "shape":
        state["txt_in.bias"] = torch.zeros(3).bfloat16()
        expected = r"'txt_in.bias' has shape \[3\], not \[256\]"
    else:
        state["img_in.weight"] = torch.zeros(256, 72).bfloat16()
        expected = "img_in takes 72 channels"
    with pytest.raises(UnknownCheckpointError, match=expected):
        open_source(save_state(state, tmp_path))


def test_incomplete_fusion_names_the_part(state: State, tmp_path: Path) -> None:
    split = diffusers_state(state)
    del split["transformer_blocks.0.attn.to_k.weight"]
    del split["single_transformer_blocks.1.proj_mlp.bias"]
    expected = (
        r"lacks 2 FLUX tensors \(first: 'single_transformer_blocks.1.proj_mlp.bias', "
        "'transformer_blocks.0.attn.to_k.weight'"
    )
    with pytest.raises(UnknownCheckpointError, match=expected):
        open_source(save_state(split, tmp_path))


def test_surplus_in_diffusers_layout_is_named(state: State, tmp_path: Path) -> None:
    split = diffusers_state(state)
    split["transformer_blocks.0.attn.k_bmm_quantizer._amax"] = torch.ones(1)
    with pytest.raises(UnknownCheckpointError, match=r"1 tensors unknown to FLUX.*k_bmm"):
        open_source(save_state(split, tmp_path))


@pytest.mark.parametrize("rows", [255, 257], ids=["fewer", "more"])
def test_parts_that_do_not_fit_together_are_named(rows: int, state: State, tmp_path: Path) -> None:
    split = diffusers_state(state)
    split["transformer_blocks.0.attn.to_k.weight"] = torch.zeros(rows, 256).bfloat16()
    expected = rf"attn.to_q.weight' of shape \[256, 256\] and .*to_k.* of shape \[{rows}, 256\]"
    with pytest.raises(DamagedCheckpointError, match=expected):
        open_source(save_state(split, tmp_path))


def test_parts_of_other_width_are_named(state: State, tmp_path: Path) -> None:
    split = diffusers_state(state)
    split["single_transformer_blocks.0.proj_mlp.weight"] = torch.zeros(1024, 128).bfloat16()
    with pytest.raises(DamagedCheckpointError, match=r"proj_mlp.* do not fit together"):
        open_source(save_state(split, tmp_path))


def test_empty_tensor_is_named(state: State, tmp_path: Path) -> None:
    state = {**state, "txt_in.weight": torch.zeros(0, 96).bfloat16()}
    with pytest.raises(DamagedCheckpointError, match=r"'txt_in.weight' has the empty shape"):
        open_source(save_state(state, tmp_path))


def shards(state: State, folder: Path) -> tuple[Path, list[Path]]:
    index = save_sharded(diffusers_state(state), folder)
    return index, sorted(folder.glob("*.safetensors"))


def test_missing_shard_is_named(state: State, tmp_path: Path) -> None:
    index, files = shards(state, tmp_path)
    files[1].unlink()
    with pytest.raises(DamagedCheckpointError, match=f"its shard '{files[1].name}' is not in"):
        open_source(index)


def test_exchanged_shards_are_noticed(state: State, tmp_path: Path) -> None:
    index, files = shards(state, tmp_path)
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(second)
    files[1].write_bytes(first)
    with pytest.raises(DamagedCheckpointError, match=r"the index expects '.*' in '.*00001"):
        open_source(index)


def test_tensor_in_two_shards_is_named(state: State, tmp_path: Path) -> None:
    index, files = shards(state, tmp_path)
    files[1].write_bytes(files[0].read_bytes())
    with pytest.raises(DamagedCheckpointError, match=r"00001.* and .*00002.* both hold"):
        open_source(index)


def test_tensor_missing_from_its_shard_is_named(state: State, tmp_path: Path) -> None:
    index, files = shards(state, tmp_path)
    save_file({"x": torch.zeros(1)}, files[2])
    with pytest.raises(DamagedCheckpointError, match=r"00003.*' does not hold"):
        open_source(index)


def test_tensor_that_the_index_does_not_list_is_named(state: State, tmp_path: Path) -> None:
    index, _ = shards(state, tmp_path)
    text = index.read_text().replace('"proj_out.bias"', '"proj_out.gain"')
    index.write_text(text)
    with pytest.raises(DamagedCheckpointError, match=r"(proj_out.gain|proj_out.bias)"):
        open_source(index)


def test_truncated_shard_is_named(state: State, tmp_path: Path) -> None:
    index, files = shards(state, tmp_path)
    files[2].write_bytes(files[2].read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match=r"its shard '.*00003.*cut short"):
        open_source(index)


def test_hugging_face_cache_of_links_is_read(state: State, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    shards(state, blobs)
    snapshot = tmp_path / "snapshots" / "abc" / "transformer"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        blob = blobs / f"{number:064}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(blob)
    index = next(snapshot.glob("*.index.json"))
    assert open_source(index).layout == "diffusers-sharded"
