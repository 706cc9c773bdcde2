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

TINY_FLUX2 = FluxConfig(
    in_channels=128,
    out_channels=128,
    vec_in_dim=None,
    context_in_dim=96,
    hidden_size=256,
    mlp_ratio=3.0,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(32, 32, 32, 32),
    theta=2000,
    patch_size=1,
    qkv_bias=False,
    guidance_embed=True,
    shared_modulation=True,
    gated_mlp=True,
    bias=False,
    txt_ids_dims=(3,),
    default_ref_method="index",
    ref_index_scale=10.0,
)

TINY_VARIANTS = {
    "flux1-dev": TINY,
    "flux1-schnell": TINY.model_copy(update={"guidance_embed": False}),
    "flux1-control": TINY.model_copy(update={"in_channels": 32}),
    "flux1-fill": TINY.model_copy(update={"in_channels": 96}),
    "flux2-dev": TINY_FLUX2,
    "flux2-klein": TINY_FLUX2.model_copy(update={"guidance_embed": False}),
}
"""A tiny model of every variant, by its name."""


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


def random_samples(
    config: FluxConfig = TINY, seed: int = 0, timesteps: int = 2, pictures: int = 2
) -> CalibrationSet:
    """Calibration samples of non-square latents with one prompt each."""
    generator = torch.Generator().manual_seed(seed)
    size, extra = (6, 8), config.in_channels - config.out_channels
    prompts = [
        Conditioning(
            torch.randn(1, 10, config.context_in_dim, generator=generator),
            torch.randn(1, config.vec_in_dim, generator=generator) if config.vec_in_dim else None,
            3.5,
            torch.randn(pictures, extra, *size, generator=generator) if extra else None,
        )
        for _ in range(pictures)
    ]
    latents = torch.randn(pictures, config.out_channels, *size, generator=generator)
    return rectified_flow_samples(latents, prompts, timesteps, seed)


def ignore_progress(phase: str, done: int, total: int) -> None:
    """A progress callback that reports to nobody."""
