"""FP8 and NVFP4 files: the exact values they stand for, and their codes untouched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import (
    comfy_mark,
    diffusers_state,
    fp8_state,
    header_mark,
    is_linear,
    nvfp4_state,
    nvfp4_weights,
    save_sharded,
    save_state,
    scaled_fp8_state,
    with_prefix,
)
from flux_fp4.quant.errors.sources import UnknownCheckpointError, UnsupportedWeightError
from flux_fp4.quant.nvfp4 import NVFP4Weight
from flux_fp4.quant.sources.source import open_source
from safetensors.torch import save_file

State = dict[str, torch.Tensor]

LINEARS = ("double_blocks.0.txt_attn.qkv", "single_blocks.1.linear1", "single_blocks.0.linear2")
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}}
FP8_DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


def write_modelopt_config(folder: Path, nested: bool = False) -> None:
    if nested:
        text = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
        (folder / "hf_quant_config.json").write_text(json.dumps(text))
    else:
        (folder / "config.json").write_text(json.dumps({"quantization_config": MODELOPT}))


def require_scaled_fp8(path: Path, stored: State, scale_name: str) -> None:
    source = open_source(path)
    assert source.layout == "fp8-scaled"
    loaded = source.tensors(source.shapes)
    for name, tensor in loaded.items():
        expected = stored[name]
        if expected.dtype.itemsize == 1:
            scale = stored[f"{name.removesuffix('.weight')}.{scale_name}"]
            expected = (expected.float() * scale).bfloat16()
        assert source.dtype(name) == torch.bfloat16
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("dtype", FP8_DTYPES, ids=["e4m3", "e5m2"])
def test_plain_fp8_is_widened_to_bf16(state: State, tmp_path: Path, dtype: torch.dtype) -> None:
    stored = fp8_state(state, dtype)
    source = open_source(save_state(stored, tmp_path))
    assert source.layout == "fp8"
    for name, tensor in source.tensors(stored).items():
        assert source.dtype(name) == tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), stored[name].float()), name


@pytest.mark.parametrize("dtype", FP8_DTYPES, ids=["e4m3", "e5m2"])
def test_old_scaled_fp8(state: State, tmp_path: Path, dtype: torch.dtype) -> None:
    stored = scaled_fp8_state(state, "scale_weight", dtype)
    stored["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    stored["img_in.scale_input"] = torch.tensor(1.0)
    require_scaled_fp8(save_state(stored, tmp_path), stored, "scale_weight")


def test_marked_scaled_fp8(state: State, tmp_path: Path) -> None:
    stored = scaled_fp8_state(state, "weight_scale", mark=comfy_mark("float8_e4m3fn"))
    require_scaled_fp8(save_state(stored, tmp_path), stored, "weight_scale")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["plain", "prefix"])
@pytest.mark.parametrize("marked_with_prefix", [True, False], ids=["full", "short"])
def test_scaled_fp8_marked_in_the_header(
    state: State, tmp_path: Path, prefix: str, marked_with_prefix: bool
) -> None:
    stored = scaled_fp8_state(state, "weight_scale")
    metadata = header_mark(stored, "float8_e4m3fn", prefix if marked_with_prefix else "")
    path = save_state(with_prefix(stored, prefix), tmp_path, metadata)
    require_scaled_fp8(path, stored, "weight_scale")


def test_fp8_with_a_scale_for_each_row(state: State, tmp_path: Path) -> None:
    stored = scaled_fp8_state(state, "weight_scale")
    name = "single_blocks.1.linear1"
    rows = torch.rand(stored[f"{name}.weight"].shape[0], 1) + 0.5
    stored[f"{name}.weight_scale"] = rows
    loaded = open_source(save_state(stored, tmp_path)).tensors([f"{name}.weight"])
    expected = (stored[f"{name}.weight"].float() * rows).bfloat16()
    assert torch.equal(loaded[f"{name}.weight"], expected)


def test_scaled_fp8_in_diffusers_layout(state: State, tmp_path: Path) -> None:
    stored = scaled_fp8_state(diffusers_state(state), "weight_scale")
    source = open_source(save_sharded(stored, tmp_path))
    name = "single_blocks.0.linear1.weight"
    layers = [f"single_transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")]
    layers.append("single_transformer_blocks.0.proj_mlp")
    expected = torch.cat(
        [stored[f"{layer}.weight"].float() * stored[f"{layer}.weight_scale"] for layer in layers]
    )
    assert torch.equal(source.tensors([name])[name], expected.bfloat16())


@pytest.fixture(scope="module")
def weights(state: State) -> dict[str, NVFP4Weight]:
    return nvfp4_weights(state)


def require_nvfp4(path: Path, layout: str, weights: dict[str, NVFP4Weight]) -> None:
    source = open_source(path)
    assert source.layout == layout
    for name, weight in weights.items():
        packed = source.packed(name.removesuffix(".weight"))
        assert packed is not None
        assert torch.equal(packed.packed, weight.packed), name
        stored, expected = (
            scale.view(torch.uint8) for scale in (packed.block_scale, weight.block_scale)
        )
        assert torch.equal(stored, expected), name
        assert packed.global_scale.shape == ()
        assert torch.equal(packed.global_scale, weight.global_scale)
        assert source.shapes[name] == tuple(weight.dequantize().shape)
    loaded = source.tensors(weights)
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight.dequantize().bfloat16()), name


@pytest.mark.parametrize("mark", ["tensors", "header"])
def test_comfyui_nvfp4(
    state: State, weights: dict[str, NVFP4Weight], tmp_path: Path, mark: str
) -> None:
    stored = nvfp4_state(state, weights, native=True)
    metadata = header_mark(stored, "nvfp4") if mark == "header" else None
    if mark == "tensors":
        for name in weights:
            comfy_mark("nvfp4")(name.removesuffix(".weight"), stored)
    require_nvfp4(save_state(stored, tmp_path, metadata), "comfyui-nvfp4", weights)


def test_comfyui_nvfp4_with_scales_as_bytes(
    state: State, weights: dict[str, NVFP4Weight], tmp_path: Path
) -> None:
    stored = nvfp4_state(state, weights, native=True)
    for name in list(stored):
        if name.endswith(".weight_scale"):
            stored[name] = stored[name].view(torch.uint8)
        if name.endswith(".weight_scale_2"):
            stored[name] = stored[name].reshape(1)
    path = save_state(stored, tmp_path, header_mark(stored, "nvfp4"))
    require_nvfp4(path, "comfyui-nvfp4", weights)


@pytest.mark.parametrize("nested", [False, True], ids=["config", "hf_quant_config"])
def test_modelopt_nvfp4(
    state: State, weights: dict[str, NVFP4Weight], tmp_path: Path, nested: bool
) -> None:
    write_modelopt_config(tmp_path, nested)
    path = save_state(nvfp4_state(state, weights, native=False), tmp_path)
    require_nvfp4(path, "modelopt-nvfp4", weights)


def modelopt_diffusers(state: State, folder: Path, one_scale: bool) -> tuple[Path, State]:
    """A ModelOpt export in diffusers' layout; with one global scale for q, k and v as it fuses."""
    split = diffusers_state(state)
    if one_scale:
        # equal maxima make equal global scales
        for name, tensor in split.items():
            if is_linear(name, tensor):
                tensor[0, 0] = 4.0
    stored = nvfp4_state(split, nvfp4_weights(split), native=False)
    write_modelopt_config(folder)
    return save_sharded(stored, folder), stored


@pytest.mark.parametrize("linear", LINEARS)
def test_modelopt_nvfp4_in_diffusers_layout_is_fused_exactly(
    state: State, tmp_path: Path, linear: str
) -> None:
    split = diffusers_state(state)
    for name, tensor in split.items():
        if is_linear(name, tensor):
            tensor[0, 0] = 4.0
    path, _ = modelopt_diffusers(state, tmp_path, one_scale=True)
    source = open_source(path)
    packed = source.packed(linear)
    assert packed is not None
    save_file(split, tmp_path / "split.safetensors")
    (tmp_path / "config.json").unlink()
    fused = open_source(tmp_path / "split.safetensors").tensors([f"{linear}.weight"])
    expected = nvfp4_weights(fused)[f"{linear}.weight"]
    assert torch.equal(packed.packed, expected.packed)
    assert torch.equal(packed.dequantize(), expected.dequantize())


def test_nvfp4_parts_with_different_global_scales_are_not_packed(
    state: State, tmp_path: Path
) -> None:
    path, stored = modelopt_diffusers(state, tmp_path, one_scale=False)
    source = open_source(path)
    linear = "double_blocks.0.img_attn.qkv"
    assert source.packed(linear) is None
    layers = [f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")]
    expected = torch.cat(
        [
            NVFP4Weight(
                *(
                    stored[f"{layer}.{part}"]
                    for part in ("weight", "weight_scale", "weight_scale_2")
                )
            ).dequantize()
            for layer in layers
        ]
    )
    assert torch.equal(
        source.tensors([f"{linear}.weight"])[f"{linear}.weight"], expected.bfloat16()
    )


def test_factor_of_the_input_is_multiplied_into_the_weight(
    state: State, weights: dict[str, NVFP4Weight], tmp_path: Path
) -> None:
    stored = nvfp4_state(state, weights, native=False)
    name = "single_blocks.0.linear2"
    factor = torch.rand(state[f"{name}.weight"].shape[1]) + 0.5
    stored[f"{name}.pre_quant_scale"] = factor.bfloat16()
    write_modelopt_config(tmp_path)
    source = open_source(save_state(stored, tmp_path))
    assert source.packed(name) is None
    expected = weights[f"{name}.weight"].dequantize() * factor.bfloat16().float()
    assert torch.equal(source.tensors([f"{name}.weight"])[f"{name}.weight"], expected.bfloat16())


def test_other_algorithm_of_modelopt_is_refused(
    state: State, weights: dict[str, NVFP4Weight], tmp_path: Path
) -> None:
    config = {"quantization_config": {**MODELOPT, "quant_algo": "MIXED_PRECISION"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedWeightError, match="algorithm MIXED_PRECISION"):
        open_source(save_state(nvfp4_state(state, weights, native=False), tmp_path))


def header_config() -> dict[str, str]:
    return {"quantization_config": json.dumps(MODELOPT)}


@pytest.mark.parametrize(
    ("marked", "in_header", "beside"),
    [
        (False, False, False),
        (True, True, False),
        (False, True, False),
        (False, True, True),
        (True, False, True),
    ],
    ids=["nothing", "both-in-header", "post-processed", "post-processed-export", "mark-and-export"],
)
def test_nvfp4_of_unknown_nibble_order_is_refused(
    state: State,
    weights: dict[str, NVFP4Weight],
    tmp_path: Path,
    marked: bool,
    in_header: bool,
    beside: bool,
) -> None:
    stored = nvfp4_state(state, weights, native=False)
    metadata = {**(header_mark(stored, "nvfp4") if marked else {})}
    metadata |= header_config() if in_header else {}
    if beside:
        write_modelopt_config(tmp_path)
    with pytest.raises(
        UnknownCheckpointError, match=r"does not say who packed it.*Choose the bf16"
    ):
        open_source(save_state(stored, tmp_path, metadata or None))


@pytest.mark.parametrize("quant_format", ["mxfp8", "int8_tensorwise", "convrot_w4a4"])
def test_other_formats_of_comfyui_are_refused_by_name(
    state: State, tmp_path: Path, quant_format: str
) -> None:
    stored = scaled_fp8_state(state, "weight_scale", mark=comfy_mark(quant_format))
    with pytest.raises(UnsupportedWeightError, match=f"stored as '{quant_format}'"):
        open_source(save_state(stored, tmp_path))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8], ids=str)
def test_other_dtypes_are_refused(state: State, tmp_path: Path, dtype: torch.dtype) -> None:
    name = "single_blocks.0.linear2.weight"
    with pytest.raises(UnsupportedWeightError, match=r"single_blocks.0.linear2.*is stored as"):
        open_source(save_state({**state, name: state[name].to(dtype)}, tmp_path))
