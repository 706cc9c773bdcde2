"""A LoRA for the small model that changes its pictures: random, in the usual file format."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_model_files import DATA, DIFFUSION_MODEL

LORA = "small_lora.safetensors"
RANK = 4
STRENGTH = 1.0
"""Norm of the change over that of the weight: digits get a foot, and stay digits."""

# kohya-ss names its keys so, with underscores for dots
_LINEARS = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.img_mlp.2",
    "single_blocks.2.linear1",
    "single_blocks.3.linear2",
)
"""All of them lie inside the plans of an engine."""


def write_small_lora(loras: Path, seed: int = 0) -> Path:
    """Write the LoRA into a folder of LoRAs and return its file."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    with safe_open(DATA / DIFFUSION_MODEL, framework="pt") as file:
        for linear in _LINEARS:
            weight = file.get_tensor(f"{linear}.weight").float()
            down = torch.randn(RANK, weight.shape[1], generator=generator)
            up = torch.randn(weight.shape[0], RANK, generator=generator)
            up *= STRENGTH * weight.norm() / (up @ down).norm()
            name = f"lora_unet_{linear.replace('.', '_')}"
            state[f"{name}.lora_down.weight"] = down.bfloat16()
            state[f"{name}.lora_up.weight"] = up.bfloat16()
            state[f"{name}.alpha"] = torch.tensor(float(RANK))
    loras.mkdir(parents=True, exist_ok=True)
    save_file(state, loras / LORA)
    return loras / LORA
