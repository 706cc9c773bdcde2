"""Sampling the small trained FLUX in one process, and LoRAs for it."""

from __future__ import annotations

from typing import Any

import torch
from comfy_in_process import import_comfyui
from small_model_files import DATA, DIFFUSION_MODEL
from torch import Tensor

import_comfyui()

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402


def stock_flux() -> Any:
    return comfy.sd.load_diffusion_model(str(DATA / DIFFUSION_MODEL))


def condition(seed: int = 0, tokens: int = 77, **options: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, 768, generator=generator)
    pooled = torch.randn(1, 768, generator=generator)
    return [[context, {"pooled_output": pooled, **options}]]


SAMPLINGS: dict[str, dict[str, Any]] = {
    "text to image": {},
    "batch 3": {"batch": 3},
    "batch 3 with cfg 2": {"batch": 3, "cfg": 2.0},
    "image to image": {
        "latent": torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2)),
        "denoise": 0.5,
    },
    "guidance off": {"positive": condition(guidance=None)},
    "two texts": {"positive": condition(tokens=77) + condition(seed=3, tokens=154)},
    "reference picture": {
        "positive": condition(reference_latents=[torch.ones(1, 16, 10, 6)]),
    },
}
"""Arguments of ``sample``: what an engine has to do like stock FLUX, whatever it is made of."""


def sample(
    model: Any,
    positive: list[Any] | None = None,
    size: tuple[int, int] = (8, 8),
    batch: int = 1,
    cfg: float = 1.0,
    denoise: float = 1.0,
    latent: Tensor | None = None,
    sampler: str = "euler",
    seed: int = 5,
) -> Tensor:
    if latent is None:
        latent = torch.zeros(batch, 16, *size)
    noise = comfy.sample.prepare_noise(latent, seed=seed)
    return comfy.sample.sample(
        model,
        noise,
        steps=3,
        cfg=cfg,
        sampler_name=sampler,
        scheduler="simple",
        positive=positive or condition(),
        negative=condition(seed=1),
        latent_image=latent,
        denoise=denoise,
        disable_pbar=True,
        seed=seed,
    )


def lora_of(*weights: str, rank: int = 2) -> dict[str, Tensor]:
    shapes = stock_flux().model.diffusion_model.state_dict()
    generator = torch.Generator().manual_seed(4)
    lora = {}
    for weight in weights:
        rows, columns = shapes[weight].shape
        name = "lora_unet_" + weight.removesuffix(".weight").replace(".", "_")
        lora[f"{name}.lora_up.weight"] = torch.randn(rows, rank, generator=generator)
        lora[f"{name}.lora_down.weight"] = torch.randn(rank, columns, generator=generator)
    return lora
