"""ComfyUI's native NVFP4: the same codes and scales as ours, laid out for cuBLAS.

Three things differ from ``NVFP4Weight`` (comfy_kitchen 0.2, ``float_utils.py`` and
``tensor/nvfp4.py``; ComfyUI 0.30, ``ops.py::_load_quantized_module``): the even element sits in the
high nibble, rows are padded to a multiple of 16, and block scales are stored in the order in which
cuBLAS reads them. Converting moves bytes and rounds nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from .nvfp4 import NVFP4_BLOCK, NVFP4Weight

_ROW_ALIGNMENT = 16
"""``TensorCoreNVFP4Layout.get_padded_shape``: rows of a weight are padded to this."""

_TILE_ROWS, _TILE_COLUMNS = 128, 4
"""Block scales of one cuBLAS tile: https://docs.nvidia.com/cuda/cublas, "1D block scaling factors
layout". Inside a tile, rows r, r + 32, r + 64 and r + 96 stand side by side, 16 bytes together."""


@dataclass(frozen=True)
class NativeNVFP4Weight:
    """A Linear weight ``[N, K]`` as ComfyUI stores it.

    Attributes:
        packed: uint8 ``[N up to 16, K/2]``; the even element sits in the high nibble.
        block_scale: float8_e4m3fn ``[N up to 128, K/16 up to 4]`` in cuBLAS's order.
        global_scale: fp32 scalar.
    """

    packed: Tensor
    block_scale: Tensor
    global_scale: Tensor


def native_shapes(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of ``packed`` and ``block_scale`` of a native ``[rows, columns]``."""
    scale_rows = _round_up(rows, _TILE_ROWS)
    scale_columns = _round_up(columns // NVFP4_BLOCK, _TILE_COLUMNS)
    return (_round_up(rows, _ROW_ALIGNMENT), columns // 2), (scale_rows, scale_columns)


def to_native(weight: NVFP4Weight) -> NativeNVFP4Weight:
    """Lay a weight out as ComfyUI stores it; padding is zero.

    Args:
        weight: Ours, ``[N, K]``.

    Returns:
        The native weight on the same device.
    """
    rows, half_columns = weight.packed.shape
    packed_shape, scale_shape = native_shapes(rows, 2 * half_columns)
    packed = weight.packed.new_zeros(packed_shape)
    packed[:rows] = _swap_nibbles(weight.packed)
    return NativeNVFP4Weight(packed, _swizzle(weight.block_scale, scale_shape), weight.global_scale)


def from_native(native: NativeNVFP4Weight, rows: int) -> NVFP4Weight:
    """Undo ``to_native``.

    Args:
        native: As ComfyUI stores it; ``block_scale`` may also be uint8, as in older files, and
            ``global_scale`` of shape ``[1]``.
        rows: N without padding, which the stored shapes do not tell.

    Returns:
        Our weight on the same device.

    Raises:
        ValueError: The shapes are not those of a native weight with that many rows; the text
            says which.
    """
    columns = 2 * native.packed.shape[-1]
    if columns % NVFP4_BLOCK:
        raise ValueError(f"{columns} inputs are not a multiple of {NVFP4_BLOCK}")
    packed_shape, scale_shape = native_shapes(rows, columns)
    _check_shape("weight", native.packed, packed_shape)
    _check_shape("weight_scale", native.block_scale, scale_shape)
    if native.global_scale.numel() != 1:
        raise ValueError(f"weight_scale_2 has {native.global_scale.numel()} values instead of 1")
    return NVFP4Weight(
        _swap_nibbles(native.packed[:rows]),
        _unswizzle(native.block_scale, rows, columns // NVFP4_BLOCK),
        native.global_scale.float().reshape(()),
    )


def native_marker(quant_format: str, *, full_precision: bool = False) -> Tensor:
    """Return the ``<linear>.comfy_quant`` tensor: uint8, JSON that names the format.

    Args:
        quant_format: A key of ComfyUI 0.30's ``quant_ops.QUANT_ALGOS``: ``nvfp4`` or
            ``float8_e4m3fn``.
        full_precision: Whether ComfyUI must multiply in high precision and leave the input as it
            is, even where the GPU could multiply in the format.
    """
    config: dict[str, object] = {"format": quant_format}
    if full_precision:
        config["full_precision_matrix_mult"] = True
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def _swap_nibbles(packed: Tensor) -> Tensor:
    return (packed << 4) | (packed >> 4)


def _swizzle(scale: Tensor, padded_shape: tuple[int, int]) -> Tensor:
    padded = torch.zeros(padded_shape, dtype=torch.uint8, device=scale.device)
    padded[: scale.shape[0], : scale.shape[1]] = scale.view(torch.uint8)
    # [tile row, quarter, row in quarter, tile column, column in tile]
    tiles = padded.unflatten(0, (-1, 4, 32)).unflatten(-1, (-1, _TILE_COLUMNS))
    ordered = tiles.permute(0, 3, 2, 1, 4)
    return ordered.reshape(padded_shape).view(torch.float8_e4m3fn)


def _unswizzle(blocked: Tensor, rows: int, columns: int) -> Tensor:
    tile_rows, tile_columns = blocked.shape[0] // _TILE_ROWS, blocked.shape[1] // _TILE_COLUMNS
    ordered = blocked.view(torch.uint8).reshape(tile_rows, tile_columns, 32, 4, _TILE_COLUMNS)
    padded = ordered.permute(0, 3, 2, 1, 4).reshape(blocked.shape)
    return padded[:rows, :columns].contiguous().view(torch.float8_e4m3fn)


def _check_shape(tensor: str, found: Tensor, needed: tuple[int, int]) -> None:
    if tuple(found.shape) != needed:
        raise ValueError(f"{tensor} has shape {list(found.shape)} instead of {list(needed)}")


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
