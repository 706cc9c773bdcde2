"""Kinds of work that quantization and export consist of, and how much of it a block is.

What a block costs depends on the recipe by its scale search, smoothing and branch, and grows with
the number of weights; what calibration costs grows with weights times tokens. Runs of equal kind
are compared by their units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .flux.config import FluxConfig, block_linears
from .recipe import Format, QuantizeOptions
from .sources.source import FluxSource

EXPORT = "export of a block's graphs"
"""Its units are files; their size does not depend on the weights."""

FINISH = "writing what is outside of blocks"
"""Its units are bytes."""


IN_BLOCKS = ("double_blocks.", "single_blocks.")
"""What the names of a block's tensors start with."""


def block_kind(block: str) -> str:
    """Return ``double`` or ``single``."""
    return block.split("_", 1)[0]


def block_weights(source: FluxSource, block: str) -> int:
    """Count the weights of a block, with its modulation and norms."""
    start = f"{block}."
    shapes = (shape for name, shape in source.shapes.items() if name.startswith(start))
    return sum(torch.Size(shape).numel() for shape in shapes)


def bytes_outside(source: FluxSource) -> int:
    """Count the bytes of a checkpoint's tensors that are in no block, as `FINISH` does."""
    return sum(
        torch.Size(shape).numel() * source.dtype(name).itemsize
        for name, shape in source.shapes.items()
        if not name.startswith(IN_BLOCKS)
    )


def quantize_work(
    block: str, formats: Iterable[Format], options: QuantizeOptions, device: str
) -> str:
    """Name the work of quantizing a block; its units are the block's weights.

    Args:
        block: Its name.
        formats: Of its Linears.
        options: The recipe and the storage of modulation.
        device: Where to compute.
    """
    recipe = options.recipe
    # auto decides after measuring: its blocks are compared with its own
    kinds = ["auto"] if recipe.auto is not None else sorted(set(formats))
    parts = [f"quantize {block_kind(block)}", "+".join(kinds)]
    if "nvfp4" in kinds or "auto" in kinds:
        parts.append(f"{recipe.scale_search} scales")
        if recipe.smoothing != "none":
            parts.append(recipe.smoothing)
        if recipe.low_rank is not None:
            branch = recipe.low_rank
            parts.append(f"branch {branch.rank} {branch.method} {branch.refinements}")
    return ", ".join([*parts, f"{options.modulation} modulation", _device_type(device)])


def measure_work(block: str, device: str) -> str:
    """Name the work of measuring a block's sensitivity for ``auto``; units as in quantizing."""
    return f"measure {block_kind(block)}, {_device_type(device)}"


def calibrate_work(block: str, device: str) -> str:
    """Name the work of carrying samples through a block; its units are operations."""
    return f"calibrate {block_kind(block)}, {_device_type(device)}"


def train_work(block: str, device: str) -> str:
    """Name the work of training a block; its units are operations of one pass."""
    return f"train {block_kind(block)}, {_device_type(device)}"


def block_operations(config: FluxConfig, block: str, weights: int, tokens: Sequence[int]) -> float:
    """Count the multiplications and additions of samples in a block.

    Args:
        config: Sizes of the model.
        block: Its name.
        weights: Of the block.
        tokens: Of image and text together, by sample.

    Returns:
        Two for each weight and token, where the streams of a double block see their own tokens only
        (counted as half of the weights for each), and four for each channel and pair of tokens.
    """
    share = 0.5 if block_kind(block) == "double" else 1.0
    width = config.hidden_size
    return sum(2.0 * share * weights * count + 4.0 * width * count**2 for count in tokens)


def linears_formats(block: str, options: QuantizeOptions) -> list[Format]:
    """Return the formats that a recipe gives a block's Linears."""
    return [options.recipe.format_of(f"{block}.{linear}") for linear in block_linears(block)]


def _device_type(device: str) -> str:
    return torch.device(device).type
