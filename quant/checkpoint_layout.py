"""Which tensors a quantized checkpoint has: known before the first one is computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .flux.config import FluxConfig, block_linears
from .modulation import is_modulation_weight, modulation_layout
from .nvfp4 import NVFP4_BLOCK
from .quantized_checkpoint import is_in_plan
from .recipe import Format, QuantizeOptions
from .sources.source import FluxSource

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def recipe_formats(config: FluxConfig, options: QuantizeOptions) -> dict[str, Format]:
    """Return the format of every Linear by its full name, as far as the recipe alone decides it."""
    linears = [f"{b}.{linear}" for b in config.block_names for linear in block_linears(b)]
    return {linear: options.recipe.format_of(linear) for linear in linears}


def checkpoint_layout(
    source: FluxSource, formats: Mapping[str, Format], options: QuantizeOptions
) -> Layout:
    """Return dtype and shape of every tensor of a quantized checkpoint.

    Args:
        source: What is quantized.
        formats: By full name of the Linear.
        options: The recipe, attention and modulation.
    """
    shapes = source.shapes
    layout: Layout = {}
    for name, shape in shapes.items():
        if is_stored_quantized(name, options):
            layout |= modulation_layout(name, shape, options.modulation)
        else:
            layout[name] = (_stored_dtype(source, name), shape)
    for linear, chosen in formats.items():
        rows, columns = shapes[f"{linear}.weight"]
        layout |= _linear_layout(linear, rows, columns, chosen, options)
    if options.fp8_attention:
        for block in source.config.block_names:
            for part in ("q_scale", "k_scale", "v_scale"):
                layout[f"{block}.attention.{part}"] = (torch.bfloat16, ())
    return layout


def _linear_layout(
    linear: str, rows: int, columns: int, chosen: Format, options: QuantizeOptions
) -> Layout:
    if chosen == "bf16":
        return {f"{linear}.weight": (torch.bfloat16, (rows, columns))}
    layout: Layout = {f"{linear}.input_scale": (torch.float32, ())}
    if chosen == "fp8":
        layout[f"{linear}.weight"] = (torch.float8_e4m3fn, (rows, columns))
        layout[f"{linear}.weight_scale"] = (torch.float32, (rows,))
        return layout
    layout[f"{linear}.weight"] = (torch.uint8, (rows, columns // 2))
    layout[f"{linear}.weight_scale"] = (torch.float8_e4m3fn, (rows, columns // NVFP4_BLOCK))
    layout[f"{linear}.weight_scale_2"] = (torch.float32, ())
    if options.recipe.smoothing != "none":
        layout[f"{linear}.pre_quant_scale"] = (torch.bfloat16, (columns,))
    if options.recipe.low_rank is not None:
        rank = options.recipe.low_rank.rank
        layout[f"{linear}.svd_down"] = (torch.bfloat16, (rank, columns))
        layout[f"{linear}.svd_up"] = (torch.bfloat16, (rows, rank))
    return layout


def is_stored_quantized(name: str, options: QuantizeOptions) -> bool:
    """Tell whether a tensor is stored in one of ComfyUI's quantized layouts."""
    return options.modulation != "bf16" and is_modulation_weight(name)


def _stored_dtype(source: FluxSource, name: str) -> torch.dtype:
    # a plan has one high-precision type; what is outside keeps fp16, where bf16 would lose bits
    stored = source.dtype(name)
    return torch.float16 if stored == torch.float16 and not is_in_plan(name) else torch.bfloat16
