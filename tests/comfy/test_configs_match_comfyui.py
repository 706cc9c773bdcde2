"""What ComfyUI detects in a checkpoint of every variant, against our configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui
from flux_fp4.quant.flux.config import FluxConfig
from flux_fp4.quant.flux.model import tensor_shapes
from flux_fp4.quant.flux.references import REFERENCE_METHODS, image_and_reference_ids
from tiny_flux import TINY_VARIANTS


def meta_state(config: FluxConfig) -> dict[str, torch.Tensor]:
    return {
        name.replace("_norm.scale", "_norm.weight"): torch.empty(shape, device="meta")
        for name, shape in tensor_shapes(config).items()
    }


def comfy_flux(config: FluxConfig) -> Any:
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    return Flux(device="meta", operations=comfy.ops.disable_weight_init, **config.unet_config())


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_config_is_what_comfyui_detects(variant: str) -> None:
    import_comfyui()
    from comfy.model_detection import detect_unet_config

    config = TINY_VARIANTS[variant]
    assert config.unet_config() == detect_unet_config(meta_state(config), "")


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_comfyui_has_the_same_tensors(variant: str) -> None:
    import_comfyui()
    config = TINY_VARIANTS[variant]
    expected = {name: tuple(t.shape) for name, t in comfy_flux(config).state_dict().items()}
    assert {name: tuple(t.shape) for name, t in meta_state(config).items()} == expected


@pytest.mark.parametrize("method", [*REFERENCE_METHODS, None])
@pytest.mark.parametrize("variant", ["flux1-dev", "flux2-klein"])
@pytest.mark.parametrize(
    "references",
    [[], [(6, 8)], [(5, 9), (4, 4), (3, 12)], [(12, 4), (6, 8)]],
    ids=["none", "one", "three_odd", "tall"],
)
def test_positions_of_reference_latents(
    variant: str, method: str | None, references: list[tuple[int, int]]
) -> None:
    import_comfyui()
    config = TINY_VARIANTS[variant]
    model = comfy_flux(config)
    seen = {}

    def forward_orig(img: torch.Tensor, img_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        seen["ids"] = img_ids
        return img

    model.forward_orig = forward_orig
    size, channels = (7, 8), config.in_channels
    latents = [torch.zeros(1, channels, *extent) for extent in references]
    named = {} if method is None else {"ref_latents_method": method}
    model._forward(
        torch.zeros(1, channels, *size),
        torch.ones(1),
        torch.zeros(1, 3, config.context_in_dim),
        ref_latents=latents or None,
        **named,
    )
    actual = image_and_reference_ids(size, references, method or config.default_ref_method, config)
    assert torch.equal(actual, seen["ids"])
