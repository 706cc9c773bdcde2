"""NVFP4: E2M1 values in blocks of 16 with an E4M3 block scale and one fp32 global scale.

A value is ``code * block_scale * global_scale``. Packing is bit-exact with ModelOpt 0.47's
``NVFP4QuantExporter`` (tested against the installed ModelOpt), done in row chunks that stay in
cache, without an fp32 copy of the whole tensor. ``nvfp4_scales`` chooses the scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .e2m1 import E2M1_MAX, decode_packed, encode_e2m1_, pack_codes, round_to_e2m1
from .errors.calibration import NotFiniteError
from .errors.sources import UnsupportedWeightError
from .nvfp4_scales import (
    E4M3_MAX,
    NVFP4_BLOCK,
    SEARCH_SCALE_MAX,
    four_over_six_scale,
    global_scale_from_amax,
    largest_value_scale,
    least_error_scale,
)
from .row_parallel import for_row_chunks

__all__ = [
    "E2M1_MAX",
    "E4M3_MAX",
    "NVFP4_BLOCK",
    "NVFP4Weight",
    "Search",
    "check_source_dtype",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "finite_amax",
    "quantize_weight",
]

Search = Literal["max", "four-over-six", "mse"]
"""How block scales are chosen: from the largest value of the block, from the better of two, or the
best of all."""

_SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class NVFP4Weight:
    """A quantized Linear weight ``[N, K]``.

    Attributes:
        packed: uint8 ``[N, K/2]``; the even element sits in the low nibble, as ONNX packs.
        block_scale: float8_e4m3fn ``[N, K/16]``, row-major.
        global_scale: fp32 scalar, ``amax / (6 * 448)``.
    """

    packed: Tensor
    block_scale: Tensor
    global_scale: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the ``[N, K]`` weight that the codes stand for, computed in fp32."""
        rows, half_columns = self.packed.shape
        weight = torch.empty(rows, 2 * half_columns, dtype=dtype, device=self.packed.device)

        def dequantize(chunk: slice) -> None:
            values = decode_packed(self.packed[chunk]).unflatten(-1, (-1, NVFP4_BLOCK))
            scale = self.block_scale[chunk].float() * self.global_scale
            weight[chunk] = values.mul_(scale[..., None]).flatten(-2)

        for_row_chunks(dequantize, weight.shape, weight.device)
        return weight


def quantize_weight(
    weight: Tensor, linear: str, search: Search = "max", importance: Tensor | None = None
) -> NVFP4Weight:
    """Quantize a Linear weight.

    Args:
        weight: ``[N, K]``, bf16, fp16 or fp32, on any device.
        linear: Name for errors.
        search: ``max`` is ModelOpt's default, bit for bit. ``four-over-six`` maps the largest value
            of a block to 6 or to 4, whichever has the smaller squared error (arXiv:2512.02010).
            ``mse`` takes the E4M3 scale with the smallest squared error of all.
        importance: ``[K]``, not negative: weighs the squared error of each input channel, for
            example by the mean of the squared input. ``max`` looks at no error and ignores it.

    Returns:
        The packed weight on the same device.

    Raises:
        UnsupportedWeightError: K is not a multiple of 16, or the dtype is none of the three.
        NotFiniteError: The weight or the importance holds NaN or infinity.
        ValueError: ``importance`` has another shape.
    """
    check_source_dtype(weight, linear)
    _check_columns(weight, linear)
    amax = finite_amax(weight, f"The weight of '{linear}'")
    block_scale_max = E4M3_MAX if search == "max" else SEARCH_SCALE_MAX
    global_scale = global_scale_from_amax(amax, block_scale_max)
    if importance is not None:
        importance = _checked_importance(importance, weight, linear)
    rows, columns = weight.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    block_scale = torch.empty(
        rows, columns // NVFP4_BLOCK, dtype=torch.float8_e4m3fn, device=weight.device
    )

    def quantize(chunk: slice) -> None:
        # a copy also of fp32: it is divided in place
        values = weight[chunk].to(torch.float32, copy=True)
        magnitude = values.abs()
        if search == "max":
            scale = largest_value_scale(magnitude, global_scale)
        elif search == "four-over-six":
            scale = four_over_six_scale(magnitude, global_scale, importance)
        else:
            scale = least_error_scale(magnitude, global_scale, importance)
        step = scale.float() * global_scale
        values.unflatten(-1, (-1, NVFP4_BLOCK)).div_(step[..., None])
        packed[chunk] = pack_codes(encode_e2m1_(values))
        block_scale[chunk] = scale

    for_row_chunks(quantize, weight.shape, weight.device)
    return NVFP4Weight(packed, block_scale, global_scale)


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """Return what ``quantize_weight`` with ``max`` and ``dequantize`` make of an fp32 weight."""
    global_scale = global_scale_from_amax(weight.abs().amax())
    quantized = torch.empty_like(weight)

    def quantize(chunk: slice) -> None:
        magnitude = weight[chunk].abs()
        scale = largest_value_scale(magnitude, global_scale).float() * global_scale
        blocks, step = magnitude.unflatten(-1, (-1, NVFP4_BLOCK)), scale[..., None]
        rounded = round_to_e2m1(blocks / step).mul_(step).flatten(-2)
        quantized[chunk] = torch.copysign(rounded, weight[chunk])

    for_row_chunks(quantize, weight.shape, weight.device)
    return quantized


def check_source_dtype(weight: Tensor, linear: str) -> None:
    """Raise ``UnsupportedWeightError`` for a weight that is not bf16, fp16 or fp32."""
    if weight.dtype not in _SOURCE_DTYPES:
        raise UnsupportedWeightError(
            linear, f"its weight is {weight.dtype}", "bf16, fp16 or fp32 is needed"
        )


def finite_amax(tensor: Tensor, subject: str) -> Tensor:
    """Return the largest magnitude as an fp32 scalar.

    Raises:
        NotFiniteError: ``subject`` holds NaN or infinity.
    """
    low, high = torch.aminmax(tensor)
    amax = torch.maximum(-low, high).float()
    if not torch.isfinite(amax):
        raise NotFiniteError(subject, "The checkpoint is damaged; get it anew.")
    return amax


def fake_quantize_activation(x: Tensor, global_scale: Tensor) -> Tensor:
    """Round ``x [..., K]`` as TensorRT's ``TRT_FP4DynamicQuantize`` and its two DQ nodes do.

    Args:
        x: Activations; computed in fp32, returned in their own dtype.
        global_scale: fp32 scalar from calibration. Blocks above ``6 * 448 * global_scale``
            saturate; a block whose scale underflows E4M3 becomes zero.

    Returns:
        The dequantized activations.
    """
    blocks = x.float().unflatten(-1, (-1, NVFP4_BLOCK))
    magnitude = blocks.abs()
    scale = magnitude.amax(-1, keepdim=True) / (E2M1_MAX * global_scale)
    step = scale.clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float().mul_(global_scale)
    # divided by infinity, a block without a step becomes zero
    scaled = magnitude.div_(step.where(step > 0, torch.inf))
    return round_to_e2m1(scaled).mul_(step).copysign_(blocks).flatten(-2).to(x.dtype)


def _check_columns(weight: Tensor, linear: str) -> None:
    columns = weight.shape[-1]
    if columns % NVFP4_BLOCK:
        raise UnsupportedWeightError(
            linear, f"it has {columns} inputs", f"a multiple of {NVFP4_BLOCK} is needed"
        )


def _checked_importance(importance: Tensor, weight: Tensor, linear: str) -> Tensor:
    if importance.shape != weight.shape[1:]:
        raise ValueError(f"importance is {list(importance.shape)}, the weight {list(weight.shape)}")
    finite_amax(importance, f"The input importance of '{linear}'")
    return importance.float()
