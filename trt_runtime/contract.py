"""What the exporter and the runtime agree on: names of blocks, inputs, outputs and axes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .spec import RANK_AXIS, RANK_TILE

CONTRACT = "3"
"""Version of what a block's file says of itself."""

LORA_SUFFIX, MASK_SUFFIX = ".lora", ".mask"
"""Behind the name of a block whose Linears take low-rank factors, and of one whose attention takes
a mask: the block's variants. Both in this order is the fourth form of a block."""

# [0-9], not \d, which takes the digits of every script
BLOCK_NAME = re.compile(r"(double|single)_blocks\.(0|[1-9][0-9]{0,3})(\.lora)?(\.mask)?")
MODULATIONS = tuple(f"mod{i}_{part}" for i in (1, 2) for part in ("shift", "scale", "gate"))
INPUTS = {
    "double": (
        "img", "txt", "cos", "sin",
        *(f"{stream}_{name}" for stream in ("img", "txt") for name in MODULATIONS),
    ),
    "single": ("x", "cos", "sin", "mod_shift", "mod_scale", "mod_gate"),
}  # fmt: skip
LINEARS = {
    "double": tuple(
        f"{stream}_{name}"
        for stream in ("img", "txt")
        for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    ),
    "single": ("linear1", "linear2"),
}
LORA_DOWN, LORA_UP = ".lora_down", ".lora_up"
"""Behind a Linear's name: the inputs ``[K, R, 16]`` and ``[R, 16, N]`` of a variant."""

MASK = "mask"
"""Input of masked variants, added to the attention scores."""

MASK_SHAPE: tuple[int | str, ...] = ("B", 1, "S", "S")

OUTPUTS = {"double": ("img_out", "txt_out"), "single": ("x_out",)}
HIGH_PRECISION = ("bf16", "fp16", "fp32")
DYNAMIC_AXES = ("B", "N", "T", "S")
MAX_DIMENSIONS = 4
MAX_SIZE = 1 << 20
"""Of an axis that is not dynamic: FLUX's widest Linear has 36,864 rows."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of a graph input or output."""

    name: str
    dtype: str
    """"bf16", "fp16" or "fp32"."""
    shape: tuple[int | str, ...]
    """Numbers, or the dynamic axes B (batch), N (image tokens), T (text tokens), S (both), and
    ``R_<linear>``, the rank of a Linear's adapters in a variant, in tiles of 16."""


def block_names(depth: int, depth_single_blocks: int) -> tuple[str, ...]:
    """Return the blocks of a model in the order they run."""
    double = (f"double_blocks.{i}" for i in range(depth))
    return (*double, *(f"single_blocks.{i}" for i in range(depth_single_blocks)))


def variant_name(block: str, lora: bool = False, mask: bool = False) -> str:
    """Return the name of one form of a block."""
    return block + LORA_SUFFIX * lora + MASK_SUFFIX * mask


def is_plain(name: str) -> bool:
    """Tell whether a name is that of a block and not of a variant."""
    return not name.endswith((LORA_SUFFIX, MASK_SUFFIX))


def input_names(block: str, kind: str) -> tuple[str, ...]:
    """Return what the contract calls the inputs of a block or variant."""
    names = INPUTS[kind]
    if block.removesuffix(MASK_SUFFIX).endswith(LORA_SUFFIX):
        factors = (f"{linear}{part}" for linear in LINEARS[kind] for part in (LORA_DOWN, LORA_UP))
        names = (*names, *factors)
    return (*names, MASK) if block.endswith(MASK_SUFFIX) else names


def is_factor(name: str) -> bool:
    """Tell whether an input is a low-rank factor."""
    return name.endswith((LORA_DOWN, LORA_UP))


def has_factor_shape(spec: TensorSpec) -> bool:
    """Tell whether a factor has its three axes; true of everything that is no factor."""
    for part, rank_axis in ((LORA_DOWN, 1), (LORA_UP, 0)):
        if spec.name.endswith(part):
            rank = (RANK_AXIS + spec.name.removesuffix(part), RANK_TILE)
            fits = len(spec.shape) == 3 and spec.shape[rank_axis : rank_axis + 2] == rank
            return fits and isinstance(spec.shape[2 - 2 * rank_axis], int)
    return not any(isinstance(dim, str) and dim.startswith(RANK_AXIS) for dim in spec.shape)


def has_possible_shape(spec: TensorSpec) -> bool:
    """Tell whether a shape has known axes and sizes within limits."""
    return 0 < len(spec.shape) <= MAX_DIMENSIONS and all(
        dim in DYNAMIC_AXES or dim.startswith(RANK_AXIS)
        if isinstance(dim, str)
        else 0 < dim <= MAX_SIZE
        for dim in spec.shape
    )
