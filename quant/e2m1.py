"""E2M1, the 4-bit floating point values of NVFP4, by arithmetic on the bits of fp32."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

E2M1_MAX = 6.0

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude by the low three bits of a code; bit 3 is the sign."""

_FLOAT_EXPONENT = 0x7F800000
"""The exponent bits of an fp32."""

_ROUNDER = 2.0**22
"""fp32 numbers from 2**22 to 2**23 are 0.5 apart: adding it rounds to halves, ties to even."""


def encode_e2m1(x: Tensor) -> Tensor:
    """Round to the nearest E2M1 value, ties to the even code, saturating at 6.

    Args:
        x: fp32 of any shape, no NaN.

    Returns:
        uint8 codes 0 to 15 of the same shape. A negative value that rounds to zero keeps its sign
        bit, minus zero does not, as in ModelOpt's ``NVFP4QTensor._cast_fp4``.
    """
    return encode_e2m1_(x.clone())


def encode_e2m1_(x: Tensor) -> Tensor:
    """As ``encode_e2m1``, with ``x`` as working memory: its values are lost."""
    # adding zero makes minus zero plus; the sign bit becomes 8
    sign = (x.add_(0.0).view(torch.int32) >> 28).to(torch.uint8).bitwise_and_(8)
    magnitude = x.abs_().clamp_(max=E2M1_MAX)
    bits = magnitude.add_(_rounder(magnitude)).view(torch.int32)
    # mantissa: value in steps of its binade; exponent 149, 150 or 151: the binade of 1, 2 or 4
    codes = (bits >> 22).add_(bits)
    # 2 * 149 modulo 256: eight bits are enough for what is left
    return codes.to(torch.uint8).sub_(2 * 149 - 256).bitwise_or_(sign)


def round_to_e2m1(magnitude: Tensor) -> Tensor:
    """Round fp32 magnitudes to the nearest E2M1 value, ties to the even code, saturating at 6."""
    clamped = magnitude.clamp(max=E2M1_MAX)
    rounder = _rounder(clamped)
    return clamped.add_(rounder).sub_(rounder)


def _rounder(magnitude: Tensor) -> Tensor:
    # E2M1 is spaced 0.5 up to 2, 1 up to 4, 2 up to 6: half of the power of two below, at least 0.5
    binade = magnitude.clamp(min=1.0).view(torch.int32).bitwise_and_(_FLOAT_EXPONENT)
    return binade.view(torch.float32).mul_(_ROUNDER)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Return the fp32 values of uint8 codes 0 to 15."""
    values = torch.tensor(E2M1_VALUES, device=codes.device)
    return torch.cat((values, -values))[codes.int()]


def decode_packed(packed: Tensor) -> Tensor:
    """Return the fp32 values ``[..., K]`` of packed codes ``[..., K/2]``."""
    pairs = _byte_values(packed.device)
    # several times as fast as indexing
    values = torch.index_select(pairs, 0, packed.flatten().int()).view(torch.float32)
    return values.view(*packed.shape[:-1], 2 * packed.shape[-1])


@functools.cache
def _byte_values(device: torch.device) -> Tensor:
    """Return for each byte the two fp32 values that it holds, seen as one fp64: half the look-ups.

    Made outside of inference mode: what is kept may be used in both.
    """
    with torch.inference_mode(False):
        values = decode_e2m1(torch.arange(16, dtype=torch.uint8, device=device))
        pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)
        return pairs.view(torch.float64).flatten()


def pack_codes(codes: Tensor) -> Tensor:
    """Pack ``[..., K]`` codes two to a byte, even element in the low nibble."""
    pairs = codes.contiguous().view(torch.int16)
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


def unpack_codes(packed: Tensor) -> Tensor:
    """Undo ``pack_codes``."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
