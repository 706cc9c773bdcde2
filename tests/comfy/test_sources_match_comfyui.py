"""Every layout that ComfyUI reads too: its loader gives the same tensors, rounding apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import (
    all_in_one_state,
    comfy_mark,
    diffusers_state,
    fp8_state,
    header_mark,
    is_linear,
    save_state,
    scaled_fp8_state,
    with_prefix,
)
from comfy_in_process import import_comfyui
from flux_fp4.quant.sources.source import open_source
from flux_fp4.quant.sqnr import sqnr_db
from tiny_flux import TINY_VARIANTS, random_flux

State = dict[str, torch.Tensor]

FLUX1 = ["flux1-dev", "flux1-schnell", "flux1-control", "flux1-fill"]
ONE_ROUNDING_DB = 45.0
"""ComfyUI multiplies by scales in bf16, whose rounding leaves about 2**-9 of a value."""


def flux_state(variant: str) -> State:
    model = random_flux(TINY_VARIANTS[variant])
    return {name: value.bfloat16() for name, value in model.state_dict().items()}


def comfy_tensors(path: Path) -> State:
    """Load with ComfyUI's 'Load Diffusion Model' and return its tensors, dequantized."""
    import_comfyui()
    import comfy.sd
    from comfy.quant_ops import QuantizedTensor

    patcher = comfy.sd.load_diffusion_model(str(path), {"dtype": torch.bfloat16})
    found = {}
    for name, parameter in patcher.model.diffusion_model.named_parameters():
        value = parameter.dequantize() if isinstance(parameter, QuantizedTensor) else parameter
        found[name.replace("_norm.weight", "_norm.scale")] = value.detach()
    return found


def our_tensors(path: Path) -> tuple[str, State]:
    source = open_source(path)
    return source.layout, source.tensors(source.shapes)


def require_equal(path: Path) -> str:
    layout, ours = our_tensors(path)
    theirs = comfy_tensors(path)
    assert ours.keys() <= theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name
    return layout


def require_close(path: Path) -> str:
    layout, ours = our_tensors(path)
    theirs = comfy_tensors(path)
    for name, tensor in ours.items():
        found = sqnr_db(tensor, theirs[name])
        assert found > ONE_ROUNDING_DB, f"{name}: {found:.1f} dB"
    return layout


@pytest.mark.parametrize("variant", TINY_VARIANTS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["bfl", "comfyui"])
def test_bfl_names(variant: str, prefix: str, tmp_path: Path) -> None:
    path = save_state(with_prefix(flux_state(variant), prefix), tmp_path)
    assert require_equal(path) == ("comfyui" if prefix else "bfl")


@pytest.mark.parametrize("variant", FLUX1)
def test_diffusers_names(variant: str, tmp_path: Path) -> None:
    path = save_state(diffusers_state(flux_state(variant)), tmp_path)
    assert require_equal(path) == "diffusers"


def test_all_in_one(tmp_path: Path) -> None:
    path = save_state(all_in_one_state(flux_state("flux1-dev")), tmp_path)
    assert require_equal(path) == "all-in-one"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_plain_fp8(dtype: torch.dtype, tmp_path: Path) -> None:
    path = save_state(fp8_state(flux_state("flux1-dev"), dtype), tmp_path)
    assert require_equal(path) == "fp8"


def old_scaled(state: State) -> tuple[State, dict[str, str] | None]:
    stored = scaled_fp8_state(state, "scale_weight")
    stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return stored, None


def marked(state: State) -> tuple[State, dict[str, str] | None]:
    return scaled_fp8_state(state, "weight_scale", mark=comfy_mark("float8_e4m3fn")), None


def marked_in_header(state: State) -> tuple[State, dict[str, str] | None]:
    stored = scaled_fp8_state(state, "weight_scale")
    return stored, header_mark(stored, "float8_e4m3fn")


@pytest.mark.parametrize("write", [old_scaled, marked, marked_in_header])
@pytest.mark.parametrize("variant", ["flux1-dev", "flux2-dev"])
def test_scaled_fp8(
    write: Callable[[State], tuple[State, dict[str, str] | None]], variant: str, tmp_path: Path
) -> None:
    stored, metadata = write(flux_state(variant))
    assert require_close(save_state(stored, tmp_path, metadata)) == "fp8-scaled"


@pytest.mark.parametrize("in_header", [False, True], ids=["tensors", "header"])
@pytest.mark.parametrize("variant", ["flux1-dev", "flux2-klein"])
def test_nvfp4_packed_by_comfyui(variant: str, in_header: bool, tmp_path: Path) -> None:
    """Codes, scales and order are ComfyUI's own: nothing of ours writes this file."""
    import_comfyui()
    from comfy_kitchen.tensor import TensorCoreNVFP4Layout

    stored: State = {}
    quantized = {}
    for name, tensor in flux_state(variant).items():
        if not is_linear(name, tensor):
            stored[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        codes, params = TensorCoreNVFP4Layout.quantize(tensor)
        quantized[layer] = tensor
        for suffix, value in TensorCoreNVFP4Layout.state_dict_tensors(codes, params).items():
            stored[name + suffix] = value
        if not in_header:
            comfy_mark("nvfp4")(layer, stored)
    metadata = header_mark(stored, "nvfp4") if in_header else None
    path = save_state(stored, tmp_path, metadata)
    assert require_close(path) == "comfyui-nvfp4"
    source = open_source(path)
    for layer, tensor in quantized.items():
        packed = source.packed(layer)
        assert packed is not None
        found = sqnr_db(tensor.float(), packed.dequantize())
        assert found > 18.0, f"{layer}: {found:.1f} dB"
