"""Sizes of the published FLUX models, for those who have no checkpoint at hand yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..flux.config import FluxConfig

_FLUX1: Mapping[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": (16, 56, 56),
    "theta": 10_000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
"""black-forest-labs/flux, ``util.py``."""

_FLUX2: Mapping[str, Any] = {
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "axes_dim": (32, 32, 32, 32),
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "shared_modulation": True,
    "gated_mlp": True,
    "bias": False,
    "txt_ids_dims": (3,),
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
"""black-forest-labs/flux2, ``model.py``."""

PUBLISHED: Mapping[str, FluxConfig] = {
    "flux1-dev": FluxConfig(**_FLUX1),
    "flux1-schnell": FluxConfig(**{**_FLUX1, "guidance_embed": False}),
    "flux1-fill": FluxConfig(**{**_FLUX1, "in_channels": 96}),
    "flux1-control": FluxConfig(**{**_FLUX1, "in_channels": 32}),
    "flux2-dev": FluxConfig(
        **_FLUX2,
        context_in_dim=15360,
        hidden_size=6144,
        num_heads=48,
        depth=8,
        depth_single_blocks=48,
        guidance_embed=True,
    ),
    "flux2-klein-9b": FluxConfig(
        **_FLUX2,
        context_in_dim=12288,
        hidden_size=4096,
        num_heads=32,
        depth=8,
        depth_single_blocks=24,
        guidance_embed=False,
    ),
    "flux2-klein-4b": FluxConfig(
        **_FLUX2,
        context_in_dim=7680,
        hidden_size=3072,
        num_heads=24,
        depth=5,
        depth_single_blocks=20,
        guidance_embed=False,
    ),
}
"""By name; Kontext and Krea have the sizes of ``flux1-dev``, Canny and Depth of
``flux1-control``."""
