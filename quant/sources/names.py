"""From a checkpoint's tensor names to BFL's: prefixes, norm names and diffusers' layout.

diffusers splits Linears that BFL fuses, and stores scale before shift in the last modulation.
Sources: ComfyUI 0.30 ``comfy/utils.py::flux_to_diffusers``; diffusers 0.40.0.dev0
``scripts/convert_flux_to_diffusers.py`` and ``loaders/single_file_utils.py::
convert_flux2_transformer_checkpoint_to_diffusers``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
"""BFL's files have none; ComfyUI's saved checkpoints and all-in-one files have the others."""

_BFL_MARK = "double_blocks.0.img_attn.qkv.weight"
_DIFFUSERS_MARKS = ("transformer_blocks.0.attn.add_q_proj.weight", "single_transformer_blocks.0.")

_NORM_WEIGHT = re.compile(r"(.+_norm)\.weight")

_DOUBLE_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""Layers of a diffusers block, one below the other, by layer of a BFL block."""

_SINGLE_FUSED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}

_DOUBLE_RENAMED = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    # FLUX.2
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
"""Layer of a BFL block by layer of a diffusers block."""

_SINGLE_RENAMED = {
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    # FLUX.2
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}

_OUTER = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    # FLUX.2
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
}

_SWAPPED = "norm_out.linear"
"""diffusers' ``AdaLayerNormContinuous`` chunks into scale and shift, BFL's ``LastLayer`` into shift
and scale."""

_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Fusion:
    """How one of BFL's tensors is put together.

    Attributes:
        parts: Stored tensors, one below the other.
        swap_halves: Whether the upper half of the rows goes below the lower one.
    """

    parts: tuple[str, ...]
    swap_halves: bool = False


@dataclass(frozen=True)
class Naming:
    """What a checkpoint's names stand for.

    Attributes:
        fusions: By BFL's name.
        surplus: Stored names that FLUX does not have.
        missing: Stored names without which a fused tensor is incomplete.
    """

    fusions: Mapping[str, Fusion]
    surplus: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def find_naming(names: Iterable[str]) -> tuple[str, bool] | None:
    """Find a FLUX transformer among tensor names.

    Returns:
        Its prefix and whether it has diffusers' names, or None if there is no FLUX.
    """
    known = set(names)
    for prefix in PREFIXES:
        if prefix + _BFL_MARK in known:
            return prefix, False
        double, single = (prefix + mark for mark in _DIFFUSERS_MARKS)
        if double in known and any(name.startswith(single) for name in known):
            return prefix, True
    return None


def bfl_naming(names: Iterable[str], prefix: str) -> Naming:
    """Read names that differ from BFL's by the prefix and by ``_norm.weight`` at most."""
    fusions = {}
    for name in names:
        bare = name.removeprefix(prefix)
        norm = _NORM_WEIGHT.fullmatch(bare)
        fusions[f"{norm[1]}.scale" if norm else bare] = Fusion((name,))
    return Naming(fusions)


def diffusers_naming(names: Iterable[str], prefix: str) -> Naming:
    """Read names in diffusers' layout."""
    parts: dict[str, list[str]] = {}
    wanted: dict[str, tuple[str, ...]] = {}
    surplus = []
    for name in names:
        layer, _, kind = name.removeprefix(prefix).rpartition(".")
        found = _bfl_layer(layer)
        if found is None or kind not in ("weight", "bias"):
            surplus.append(name)
            continue
        target, layers = found
        tensor = f"{target}.scale" if target.endswith("_norm") else f"{target}.{kind}"
        parts.setdefault(tensor, []).append(name)
        wanted.setdefault(tensor, tuple(f"{prefix}{part}.{kind}" for part in layers))
    fusions = {
        tensor: Fusion(wanted[tensor], tensor.startswith(_OUTER[_SWAPPED])) for tensor in parts
    }
    missing = [
        part for tensor, found in parts.items() for part in wanted[tensor] if part not in found
    ]
    return Naming(fusions, tuple(surplus), tuple(missing))


def _bfl_layer(layer: str) -> tuple[str, tuple[str, ...]] | None:
    """Return BFL's name of the layer that a diffusers layer is part of, and all its parts."""
    block = _BLOCK.fullmatch(layer)
    if block is None:
        return (_OUTER[layer], (layer,)) if layer in _OUTER else None
    start, inner = layer.removesuffix(block[3]), block[3]
    single = block[1] is not None
    stack = f"{'single' if single else 'double'}_blocks.{block[2]}"
    renamed = (_SINGLE_RENAMED if single else _DOUBLE_RENAMED).get(inner)
    if renamed is not None:
        return f"{stack}.{renamed}", (layer,)
    for target, parts in (_SINGLE_FUSED if single else _DOUBLE_FUSED).items():
        if inner in parts:
            return f"{stack}.{target}", tuple(start + part for part in parts)
    return None
