"""Rounding that gradients pass: what a plan computes forward, a straight-through estimate back.

The straight-through estimator takes the derivative of rounding for 1 inside of the format's range
and for 0 where the value saturates (Bengio et al. 2013, arXiv:1308.3432; ModelOpt 0.47
``tensor_quant.py``: ``FP4CastSTEFunction``, ``ScaledE4M3Function``). Codes differ from that in one
thing: the largest value of a block often lies just above 6, and may move down from there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..e2m1 import E2M1_MAX, round_to_e2m1
from ..emulation import fake_quantize_fp8
from ..nvfp4 import fake_quantize_activation
from ..nvfp4_scales import E4M3_MAX, E4M3_TINY


class _RoundE2M1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return round_to_e2m1(x.abs()).copysign_(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # descent may bring a saturated value back, but not push it further out
        outwards = x * gradient < 0
        return gradient.masked_fill((x.abs() > E2M1_MAX) & outwards, 0.0)


class _RoundE4M3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # not masked: a scale that once left the range could never come back
        return gradient


class _RoundActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, global_scale: Tensor) -> Tensor:
        return fake_quantize_activation(x, global_scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # block scales follow each token's own largest value: next to nothing saturates
        return gradient, None


class _RoundFP8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x.abs() > E4M3_MAX * scale)
        return fake_quantize_fp8(x, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (saturated,) = ctx.saved_tensors
        return gradient.masked_fill(saturated, 0.0), None


def round_e2m1(x: Tensor) -> Tensor:
    """Round fp32 ``x`` to the nearest E2M1 value; see ``e2m1.round_to_e2m1``."""
    rounded: Tensor = _RoundE2M1.apply(x)  # type: ignore[no-untyped-call]
    return rounded


def round_block_scale(x: Tensor) -> Tensor:
    """Round fp32 block scales to positive E4M3 values, returned as fp32."""
    rounded: Tensor = _RoundE4M3.apply(x)  # type: ignore[no-untyped-call]
    return rounded


def round_nvfp4_activation(x: Tensor, global_scale: Tensor) -> Tensor:
    """As ``nvfp4.fake_quantize_activation``, with a gradient."""
    rounded: Tensor = _RoundActivation.apply(x, global_scale)  # type: ignore[no-untyped-call]
    return rounded


def round_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """As ``emulation.fake_quantize_fp8``, with a gradient."""
    rounded: Tensor = _RoundFP8.apply(x, scale)  # type: ignore[no-untyped-call]
    return rounded
