"""The shape of a FLUX transformer, read from the tensors of its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

HEAD_DIM = 128
"""Width of one attention head of every FLUX.1 model (black-forest-labs/flux, ``util.py``: axes_dim
[16, 56, 56]); ComfyUI derives ``num_heads`` from it (0.30, ``model_detection.py``)."""

_PATCH_SIZE = 2
_VARIANTS = {
    16: "flux1",
    32: "flux1-control",
    96: "flux1-fill",
}
"""Latent channels into ``img_in`` by model: dev, schnell, Krea and Kontext take the latent itself;
Canny and Depth add the control image's latent; Fill adds latent and mask."""


class FluxConfig(BaseModel):
    """Sizes of a FLUX.1 transformer, in the names of ComfyUI's ``FluxParams``.

    ``in_channels`` and ``out_channels`` count latent channels before 2x2 patches are folded in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: tuple[int, ...]
    theta: int
    patch_size: int
    qkv_bias: bool
    guidance_embed: bool

    @property
    def mlp_size(self) -> int:
        """Width of the MLP between its two Linears."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def variant(self) -> str:
        """Name of the model family member, as far as the shapes tell it."""
        family = _VARIANTS[self.in_channels]
        if family == "flux1":
            return "flux1-dev" if self.guidance_embed else "flux1-schnell"
        return family

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of all blocks in the order in which samples pass through them."""
        double = [f"double_blocks.{i}" for i in range(self.depth)]
        single = [f"single_blocks.{i}" for i in range(self.depth_single_blocks)]
        return (*double, *single)

    def unet_config(self) -> dict[str, object]:
        """Return the configuration under ComfyUI 0.30's names (``detect_unet_config``)."""
        return {
            **self.model_dump(),
            "axes_dim": list(self.axes_dim),
            "image_model": "flux",
            "txt_ids_dims": [],
            "yak_mlp": False,
            "txt_norm": False,
        }


def block_linears(block: str) -> tuple[str, ...]:
    """Return the names of a block's Linears that are quantized, relative to the block.

    Modulation is absent: it acts on one vector per image and stays outside of the plan.
    """
    if block.startswith("double_blocks."):
        layers = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
        return tuple(f"{stream}_{layer}" for stream in ("img", "txt") for layer in layers)
    return ("linear1", "linear2")


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> FluxConfig:
    """Read the configuration off tensor shapes in BFL's names.

    Args:
        shapes: Shape by tensor name, without any ``model.diffusion_model.`` prefix.

    Returns:
        The configuration. ``axes_dim``, ``theta`` and ``patch_size`` leave no trace in the
        shapes; they are those of every FLUX.1 model.

    Raises:
        KeyError: A tensor that the configuration is read from is missing.
        ValueError: The shapes are not those of a FLUX.1 model; the text says which.
    """
    img_in, txt_in = shapes["img_in.weight"], shapes["txt_in.weight"]
    hidden_size = img_in[0]
    in_channels = img_in[1] // _PATCH_SIZE**2
    if in_channels not in _VARIANTS:
        raise ValueError(f"img_in takes {img_in[1]} channels, FLUX.1 models take 64, 128 or 384")
    if hidden_size % HEAD_DIM:
        raise ValueError(f"hidden size {hidden_size} is not a multiple of {HEAD_DIM}")
    return FluxConfig(
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.weight"][0] // _PATCH_SIZE**2,
        vec_in_dim=shapes["vector_in.in_layer.weight"][1],
        context_in_dim=txt_in[1],
        hidden_size=hidden_size,
        mlp_ratio=shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden_size,
        num_heads=hidden_size // HEAD_DIM,
        depth=_count_blocks(shapes, "double_blocks"),
        depth_single_blocks=_count_blocks(shapes, "single_blocks"),
        axes_dim=(16, 56, 56),
        theta=10_000,
        patch_size=_PATCH_SIZE,
        qkv_bias="double_blocks.0.img_attn.qkv.bias" in shapes,
        guidance_embed="guidance_in.in_layer.weight" in shapes,
    )


def _count_blocks(shapes: Mapping[str, Sequence[int]], stack: str) -> int:
    pattern = re.compile(rf"{stack}\.(\d+)\.")
    indices = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    if indices != set(range(len(indices))) or not indices:
        raise ValueError(f"{stack} holds blocks {sorted(indices)}, expected 0, 1, 2, ...")
    return len(indices)
