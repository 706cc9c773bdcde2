"""FP8 weights: E4M3 values with one fp32 scale per output row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .nvfp4 import E4M3_MAX, check_source_dtype, finite_amax
from .row_parallel import for_row_chunks


@dataclass(frozen=True)
class FP8Weight:
    """A quantized Linear weight ``[N, K]``.

    Attributes:
        values: float8_e4m3fn ``[N, K]``.
        scale: fp32 ``[N]``, the row's largest magnitude divided by 448.
    """

    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """Return the fp32 ``[N, K]`` weight that the values stand for."""
        return self.values.float() * self.scale[:, None]


def quantize_weight_fp8(weight: Tensor, linear: str) -> FP8Weight:
    """Quantize a Linear weight by the largest value of each output row.

    As ModelOpt 0.47's ``FP8_PER_CHANNEL_PER_TOKEN`` preset treats weights. A row of zeros gets
    scale 1.

    Args:
        weight: ``[N, K]``, bf16, fp16 or fp32, on any device.
        linear: Name for errors.

    Returns:
        The quantized weight on the same device.

    Raises:
        UnsupportedWeightError: The dtype is none of the three.
        NotFiniteError: The weight holds NaN or infinity.
    """
    check_source_dtype(weight, linear)
    finite_amax(weight, f"The weight of '{linear}'")
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)

    def quantize(chunk: slice) -> None:
        rows = weight[chunk].float()
        step = rows.abs().amax(-1) / E4M3_MAX
        step = torch.where(step == 0, torch.ones_like(step), step)
        # amax / (amax / 448) can round to just above 448, which E4M3 would turn into NaN
        values[chunk] = (rows / step[:, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(values.dtype)
        scale[chunk] = step

    for_row_chunks(quantize, weight.shape, weight.device)
    return FP8Weight(values, scale)
