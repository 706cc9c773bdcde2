"""Random FLUX checkpoints small enough for unit tests; two heads, so that head order matters."""

from __future__ import annotations

from pathlib import Path

import torch
from flux_fp4.quant.calibration import CalibrationSet, Conditioning, rectified_flow_samples
from flux_fp4.quant.flux.config import FluxConfig
from flux_fp4.quant.flux.model import Flux
from safetensors.torch import save_file

TINY = FluxConfig(
    in_channels=16,
    out_channels=16,
    vec_in_dim=64,
    context_in_dim=96,
    hidden_size=256,
    mlp_ratio=4.0,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(16, 56, 56),
    theta=10_000,
    patch_size=2,
    qkv_bias=True,
    guidance_embed=True,
)


def random_flux(config: FluxConfig = TINY, seed: int = 0) -> Flux:
    """A FLUX whose biases and norm weights are as random as its matrices."""
    generator = torch.Generator().manual_seed(seed)
    model = Flux(config).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            value *= parameter.shape[1] ** -0.5
        else:
            value = 1 + 0.2 * value if name.endswith(".scale") else 0.1 * value
        parameter.copy_(value)
    return model


def save_flux(
    model: Flux, path: Path, prefix: str = "", dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write a model as a BFL checkpoint."""
    state = {prefix + name: value.to(dtype) for name, value in model.state_dict().items()}
    save_file(state, path)
    return path


def random_samples(config: FluxConfig = TINY, seed: int = 0, timesteps: int = 2) -> CalibrationSet:
    """Calibration samples of two non-square latents with one prompt each."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        Conditioning(
            torch.randn(1, 10, config.context_in_dim, generator=generator),
            torch.randn(1, config.vec_in_dim, generator=generator),
            3.5,
        )
        for _ in range(2)
    ]
    latents = torch.randn(2, config.in_channels, 6, 8, generator=generator)
    return rectified_flow_samples(latents, prompts, timesteps, seed)


def ignore_progress(phase: str, done: int, total: int) -> None:
    """A progress callback that reports to nobody."""
