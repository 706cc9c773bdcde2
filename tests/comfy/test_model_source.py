"""A MODEL as source of weights, against ComfyUI's own merging of LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui
from safetensors.torch import load_file, save_file
from small_model_files import DATA, DIFFUSION_MODEL

import_comfyui()

import comfy.hooks  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402
from flux_fp4.nodes.errors import ModelSourceError  # noqa: E402
from flux_fp4.nodes.model_source import ModelSource  # noqa: E402
from flux_fp4.quant.sources.source import open_source  # noqa: E402

SOURCE = DATA / DIFFUSION_MODEL
TOUCHED = "double_blocks.0.img_attn.qkv"
OTHER = "single_blocks.1.linear2"


@pytest.fixture(scope="module")
def stock() -> Any:
    return comfy.sd.load_diffusion_model(str(SOURCE))


def lora_for(linear: str, seed: int) -> dict[str, torch.Tensor]:
    rows, columns = open_source(SOURCE).shapes[f"{linear}.weight"]
    generator = torch.Generator().manual_seed(seed)
    name = f"lora_unet_{linear.replace('.', '_')}"
    return {
        f"{name}.lora_down.weight": torch.randn(4, columns, generator=generator) * 0.1,
        f"{name}.lora_up.weight": torch.randn(rows, 4, generator=generator) * 0.1,
        f"{name}.alpha": torch.tensor(4.0),
    }


def with_lora(model: Any, linear: str, strength: float, seed: int = 0) -> Any:
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora_for(linear, seed), strength, 0)
    return patched


def test_plain_model_has_the_tensors_of_its_file(stock: Any) -> None:
    source, file = ModelSource(stock), open_source(SOURCE)
    assert source.shapes == file.shapes
    assert source.config == file.config
    names = list(file.shapes)
    ours, theirs = source.tensors(names), file.tensors(names)
    for name in names:
        assert torch.equal(ours[name].float(), theirs[name].float()), name


@pytest.mark.parametrize("strengths", [(0.8,), (-0.5,), (0.7, 0.4)], ids=str)
def test_merged_loras_are_those_that_comfyui_samples_with(
    stock: Any, strengths: tuple[float, ...]
) -> None:
    model = stock
    for seed, strength in enumerate(strengths):
        model = with_lora(model, TOUCHED, strength, seed)
    source = ModelSource(model)
    merged = source.tensors([f"{TOUCHED}.weight"])[f"{TOUCHED}.weight"]
    key = f"diffusion_model.{TOUCHED}.weight"
    sampled = model.patch_weight_to_device(key, return_weight=True)
    # ComfyUI rounds the sum to the weight's type, in either direction
    step = torch.finfo(sampled.dtype).eps * sampled.abs().float().clamp(min=1e-6)
    assert ((merged - sampled.float()).abs() <= step).all()
    before = stock.model.diffusion_model.get_submodule(TOUCHED).weight.float()
    assert (merged - before).abs().max() > 1e-3
    assert source.dtype(f"{TOUCHED}.weight") == torch.float32
    untouched = source.tensors([f"{OTHER}.weight"])[f"{OTHER}.weight"]
    assert torch.equal(
        untouched, stock.model.diffusion_model.get_submodule(OTHER).weight.to(untouched)
    )


def test_model_that_is_loaded_with_its_lora_gives_the_same(stock: Any) -> None:
    model = with_lora(stock, TOUCHED, 0.8)
    name = f"{TOUCHED}.weight"
    before = ModelSource(model).tensors([name])[name]
    mm.load_models_gpu([model], force_full_load=True)
    try:
        assert torch.equal(ModelSource(model).tensors([name])[name], before)
    finally:
        mm.unload_all_models()


def test_digest_tells_strength_adapter_and_weight_apart(stock: Any, tmp_path: Path) -> None:
    state = load_file(SOURCE)
    state[f"{OTHER}.weight"][0, 0] += 1
    save_file(state, tmp_path / "other.safetensors")
    models = {
        "plain": stock,
        "lora": with_lora(stock, TOUCHED, 0.8),
        "weaker": with_lora(stock, TOUCHED, 0.4),
        "another": with_lora(stock, TOUCHED, 0.8, seed=1),
        "elsewhere": with_lora(stock, OTHER, 0.8),
        "finetune": comfy.sd.load_diffusion_model(str(tmp_path / "other.safetensors")),
    }
    digests = {name: ModelSource(model).digest() for name, model in models.items()}
    assert len(set(digests.values())) == len(digests), digests
    again = comfy.sd.load_diffusion_model(str(SOURCE))
    assert ModelSource(with_lora(again, TOUCHED, 0.8)).digest() == digests["lora"]


def test_scheduled_lora_is_refused(stock: Any) -> None:
    model = stock.clone()
    patches = {f"diffusion_model.{TOUCHED}.weight": (torch.zeros(1),)}
    model.add_hook_patches(comfy.hooks.WeightHook(), patches)
    with pytest.raises(ModelSourceError, match=r"scheduled .* by hooks"):
        ModelSource(model)


def test_injected_adapter_is_refused(stock: Any) -> None:
    model = stock.clone()
    model.set_injections("bypass_lora", [])
    with pytest.raises(ModelSourceError, match="'bypass_lora' is injected"):
        ModelSource(model)
