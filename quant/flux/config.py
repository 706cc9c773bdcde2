"""The shape of a FLUX transformer, read from the tensors of its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

PATCH_PIXELS = 16
"""Side of the picture's part that is one token: the autoencoders take 8 pixels to 1 and FLUX.1 then
takes 2 x 2 of the latent; FLUX.2's autoencoder does both (black-forest-labs/flux and flux2)."""

_FLUX1_VARIANTS = {
    16: "flux1",
    32: "flux1-control",
    96: "flux1-fill",
}
"""Latent channels into ``img_in`` by model: dev, schnell, Krea and Kontext take the latent itself;
Canny and Depth add the control image's latent; Fill adds latent and mask."""


@dataclass(frozen=True)
class _Family:
    """What all models of a family have in common; fields as in ``FluxConfig``."""

    name: str
    in_channels: tuple[int, ...]
    out_channels: int
    mlp_ratio: float
    axes_dim: tuple[int, ...]
    theta: int
    patch_size: int
    qkv_bias: bool
    differences: Mapping[str, Any]


_FLUX1 = _Family(
    name="FLUX.1",
    in_channels=tuple(_FLUX1_VARIANTS),
    out_channels=16,
    mlp_ratio=4.0,
    axes_dim=(16, 56, 56),
    theta=10_000,
    patch_size=2,
    qkv_bias=True,
    differences={},
)
"""black-forest-labs/flux, ``util.py``; ComfyUI 0.30's ``detect_unet_config`` assumes the same."""

_FLUX2 = _Family(
    name="FLUX.2",
    in_channels=(128,),
    out_channels=128,
    mlp_ratio=3.0,
    axes_dim=(32, 32, 32, 32),
    theta=2000,
    patch_size=1,
    qkv_bias=False,
    differences={
        "shared_modulation": True,
        "gated_mlp": True,
        "bias": False,
        "txt_ids_dims": (3,),
        "default_ref_method": "index",
        "ref_index_scale": 10.0,
    },
)
"""black-forest-labs/flux2, ``model.py`` (``Flux2Params``, ``Klein9BParams``, ``Klein4BParams``);
ComfyUI as above."""


_Size = Annotated[int, Field(ge=1, le=1 << 20)]
_Depth = Annotated[int, Field(ge=0, le=9999)]


class FluxConfig(BaseModel):
    """Sizes of a FLUX transformer, most of them in the names of ComfyUI's ``FluxParams``.

    The defaults are FLUX.1's, so that a header written before FLUX.2 was known still reads.

    Attributes:
        in_channels: Latent channels into ``img_in``, before patches are folded in.
        out_channels: Latent channels that are predicted.
        vec_in_dim: Width of the pooled text; None where the model takes none (FLUX.2).
        context_in_dim: Width of the text states.
        hidden_size: Width of a token.
        mlp_ratio: Width of the MLP between its two Linears, by that of a token.
        num_heads: Attention heads of ``sum(axes_dim)`` channels each.
        depth: Double blocks.
        depth_single_blocks: Single blocks.
        axes_dim: Channels of a head rotated by each axis of a token's position.
        theta: Base of the rotary frequencies.
        patch_size: Latent pixels along one side of a token.
        qkv_bias: Whether qkv of the double blocks has a bias.
        guidance_embed: Whether the distilled guidance scale is an input.
        shared_modulation: Whether all double blocks share their modulation, and all single blocks
            theirs (FLUX.2); ComfyUI's ``global_modulation``.
        gated_mlp: Whether the MLP is ``SiLU(a) * b`` of two halves (FLUX.2) and not GELU; ComfyUI's
            ``mlp_silu_act``.
        bias: Whether the other Linears have a bias; ComfyUI's ``ops_bias``.
        txt_ids_dims: Axes along which text tokens are counted; elsewhere their position is zero.
        default_ref_method: How ComfyUI places reference latents if no node says so.
        ref_index_scale: Distance of reference latents along axis 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    in_channels: _Size
    out_channels: _Size
    vec_in_dim: _Size | None
    context_in_dim: _Size
    hidden_size: _Size
    mlp_ratio: float = Field(gt=0, le=16)
    num_heads: _Size
    depth: _Depth
    depth_single_blocks: _Depth
    axes_dim: tuple[_Size, ...] = Field(min_length=1, max_length=8)
    theta: int = Field(ge=1, le=1 << 31)
    patch_size: int = Field(ge=1, le=16)
    qkv_bias: bool
    guidance_embed: bool
    shared_modulation: bool = False
    gated_mlp: bool = False
    bias: bool = True
    txt_ids_dims: tuple[Annotated[int, Field(ge=0, le=7)], ...] = Field(default=(), max_length=8)
    default_ref_method: str = Field(default="offset", max_length=100)
    ref_index_scale: float = 1.0

    @model_validator(mode="after")
    def _heads_fill_the_width(self) -> FluxConfig:
        if self.hidden_size != self.num_heads * sum(self.axes_dim):
            heads = f"{self.num_heads} heads of {sum(self.axes_dim)} channels"
            raise ValueError(f"{heads} do not make a hidden size of {self.hidden_size}")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        """Width of the MLP's hidden layer: what its second Linear reads."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def mlp_in_size(self) -> int:
        """What the MLP's first Linear gives: with a gate, twice the width of the hidden layer."""
        return 2 * self.mlp_size if self.gated_mlp else self.mlp_size

    @property
    def variant(self) -> str:
        """Name of the model family member, as far as the shapes tell it.

        FLUX.2 Klein, base or distilled, 4B or 9B, is told from FLUX.2 dev by the absence of a
        guidance embedding (black-forest-labs/flux2, ``model.py``: ``use_guidance_embed``).
        """
        if self.shared_modulation:
            return "flux2-dev" if self.guidance_embed else "flux2-klein"
        family = _FLUX1_VARIANTS[self.in_channels]
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
        """Return what ComfyUI 0.30's ``detect_unet_config`` finds in this transformer."""
        config = self.model_dump(exclude=set(_FLUX2.differences))
        config |= {
            "axes_dim": list(self.axes_dim),
            "txt_ids_dims": list(self.txt_ids_dims),
            "image_model": "flux",
            "yak_mlp": False,
            "txt_norm": False,
        }
        if self.shared_modulation:
            config |= {
                "image_model": "flux2",
                "global_modulation": True,
                "mlp_silu_act": self.gated_mlp,
                "ops_bias": self.bias,
                "default_ref_method": self.default_ref_method,
                "ref_index_scale": self.ref_index_scale,
            }
        return config


def block_linears(block: str) -> tuple[str, ...]:
    """Return the names of a block's Linears that are quantized, relative to the block.

    Modulation is absent: it acts on one vector per image and stays outside of the plan.
    """
    if block.startswith("double_blocks."):
        layers = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
        return tuple(f"{stream}_{layer}" for stream in ("img", "txt") for layer in layers)
    return ("linear1", "linear2")


def plan_shapes(config: FluxConfig, block: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a block that belongs to its plan, before quantization.

    Args:
        config: Of the transformer.
        block: For example ``double_blocks.0``.

    Returns:
        Shape by name relative to the block.
    """
    width, mlp, mlp_in = config.hidden_size, config.mlp_size, config.mlp_in_size
    if block.startswith("double_blocks."):
        streams: tuple[str, ...] = ("img_", "txt_")
        linears = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.0": (mlp_in, width),
            "mlp.2": (width, mlp),
        }
        norm = "attn.norm"
    else:
        streams = ("",)
        linears = {"linear1": (3 * width + mlp_in, width), "linear2": (width, width + mlp)}
        norm = "norm"
    shapes: dict[str, tuple[int, ...]] = {}
    for stream in streams:
        for linear, shape in linears.items():
            shapes[f"{stream}{linear}.weight"] = shape
            if config.qkv_bias if linear == "attn.qkv" else config.bias:
                shapes[f"{stream}{linear}.bias"] = shape[:1]
        for part in ("query_norm", "key_norm"):
            shapes[f"{stream}{norm}.{part}.scale"] = (config.head_dim,)
    return shapes


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> FluxConfig:
    """Read the configuration off tensor shapes in BFL's names.

    Args:
        shapes: Shape by tensor name, without any ``model.diffusion_model.`` prefix.

    Returns:
        The configuration of a FLUX.1 or FLUX.2 transformer.

    Raises:
        KeyError: A tensor that the configuration is read from is missing.
        ValueError: The shapes are those of neither; the text says which.
    """
    flux2 = "double_stream_modulation_img.lin.weight" in shapes
    family = _FLUX2 if flux2 else _FLUX1
    img_in = shapes["img_in.weight"]
    hidden_size, head_dim = img_in[0], sum(family.axes_dim)
    if hidden_size % head_dim:
        raise ValueError(f"hidden size {hidden_size} is not a multiple of {head_dim}")
    config = FluxConfig(
        in_channels=img_in[1] // family.patch_size**2,
        out_channels=family.out_channels,
        vec_in_dim=None if flux2 else shapes["vector_in.in_layer.weight"][1],
        context_in_dim=shapes["txt_in.weight"][1],
        hidden_size=hidden_size,
        mlp_ratio=family.mlp_ratio,
        num_heads=hidden_size // head_dim,
        depth=_count_blocks(shapes, "double_blocks"),
        depth_single_blocks=_count_blocks(shapes, "single_blocks"),
        axes_dim=family.axes_dim,
        theta=family.theta,
        patch_size=family.patch_size,
        qkv_bias=family.qkv_bias,
        guidance_embed="guidance_in.in_layer.weight" in shapes,
        **family.differences,
    )
    _check_family(shapes, config, family)
    return config


def _check_family(shapes: Mapping[str, Sequence[int]], config: FluxConfig, family: _Family) -> None:
    patch = family.patch_size**2
    expected = (
        ("img_in", 1, "takes", [channels * patch for channels in family.in_channels]),
        ("final_layer.linear", 0, "gives", [family.out_channels * patch]),
        ("double_blocks.0.img_mlp.0", 0, "gives", [config.mlp_in_size]),
    )
    for layer, axis, verb, widths in expected:
        found = shapes[f"{layer}.weight"][axis]
        if found not in widths:
            limit = ", ".join(map(str, widths))
            raise ValueError(f"{layer} {verb} {found} channels, in {family.name} it {verb} {limit}")


def _count_blocks(shapes: Mapping[str, Sequence[int]], stack: str) -> int:
    pattern = re.compile(rf"{stack}\.(\d+)\.")
    indices = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    if indices != set(range(len(indices))) or not indices:
        raise ValueError(f"{stack} holds blocks {sorted(indices)}, expected 0, 1, 2, ...")
    return len(indices)
