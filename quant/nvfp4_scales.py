"""The scales of an NVFP4 weight: by the largest value, by the better of two, by the best of all.

A block scale is an E4M3 value; times the global scale it is the step between codes. Errors are
squared and summed over a block of 16, each input channel weighed by its importance if there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .e2m1 import E2M1_MAX, round_to_e2m1

NVFP4_BLOCK = 16
"""Elements along K that share a block scale (OCP/NVIDIA NVFP4)."""

E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
"""Smallest positive E4M3 value; ModelOpt 0.47 clamps block scales to it."""

SEARCH_SCALE_MAX = 256.0
"""Largest block scale by which a search sets the global scale, instead of 448: times 6/4 it is
still an E4M3 value (Four Over Six, arXiv:2512.02010; ModelOpt 0.47 ``E4M3_MAX_46``)."""

_CODES_PER_BINADE = 8
_LARGEST_CODE = 126
"""E4M3 codes count up through 8 values per power of two to 448; 127 is NaN."""

_LARGEST_ODD_CODE = 15
"""Codes above it halve to other codes; of those up to it, only the even ones do (subnormals)."""


def global_scale_from_amax(amax: Tensor, block_scale_max: float = E4M3_MAX) -> Tensor:
    """Return ``amax / (6 * block_scale_max)``, or 1 for an all-zero tensor, in fp32.

    ModelOpt 0.47 ``onnx/quantization/quant_utils.py::get_weights_scaling_factor_2``.
    """
    scale = amax.float() / (E2M1_MAX * block_scale_max)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def largest_value_scale(magnitude: Tensor, global_scale: Tensor) -> Tensor:
    """Return the block scales that map each block's largest value to 6.

    A block of zeros gets scale 1, as in ModelOpt 0.47.

    Args:
        magnitude: fp32 ``[N, K]``, not negative.
        global_scale: fp32 scalar.

    Returns:
        float8_e4m3fn ``[N, K/16]``.
    """
    # amax / (6 * g) in this order: amax / 6 / g flips E4M3 ties against ModelOpt
    return _to_e4m3(functional.max_pool1d(magnitude, NVFP4_BLOCK) / (E2M1_MAX * global_scale))


def four_over_six_scale(
    magnitude: Tensor, global_scale: Tensor, importance: Tensor | None
) -> Tensor:
    """Return the block scales that map the largest value to 6 or to 4, by the smaller error.

    E2M1 has nothing between 4 and 6, so values just below the largest are rounded badly when it
    becomes 6. Equal errors choose 6, as in ModelOpt 0.47's ``MseCalibrator``.

    Args:
        magnitude: fp32 ``[N, K]``, not negative.
        global_scale: fp32 scalar, for block scales up to ``SEARCH_SCALE_MAX``.
        importance: fp32 ``[K]``, or none for equal weights.

    Returns:
        float8_e4m3fn ``[N, K/16]``.
    """
    blocks, weight = _as_blocks(magnitude, importance)
    # ModelOpt 0.47 ``nvfp4_tensor.py``, static path: (amax / 6) * 256 / (global amax / 6)
    unit = global_scale * SEARCH_SCALE_MAX
    largest = functional.max_pool1d(magnitude, NVFP4_BLOCK)
    six, four = (
        _to_e4m3(largest * factor / E2M1_MAX * SEARCH_SCALE_MAX / unit) for factor in (1.0, 1.5)
    )
    error_of_six = _block_error(blocks, six.float() * global_scale, weight)
    error_of_four = _block_error(blocks, four.float() * global_scale, weight)
    better = (error_of_four < error_of_six).view(torch.uint8)
    # torch has no `where` for E4M3: choose between the bytes
    return torch.where(better.bool(), four.view(torch.uint8), six.view(torch.uint8)).view(six.dtype)


def least_error_scale(magnitude: Tensor, global_scale: Tensor, importance: Tensor | None) -> Tensor:
    """Return the block scales with the smallest error of all 126 positive E4M3 values.

    Only about twelve need a look. Where scale s covers a block (largest value <= 6 s), its values
    include all those of 2 s up to 6 s, so 2 s is never better: scales above a third of the largest
    value are out. Going down from there, what is cut off beyond 6 s only grows: once that alone
    exceeds the best error, all smaller scales are out as well.

    Args:
        magnitude: fp32 ``[N, K]``, not negative.
        global_scale: fp32 scalar.
        importance: fp32 ``[K]``, or none for equal weights.

    Returns:
        float8_e4m3fn ``[N, K/16]``; scale 1 for a block of zeros.
    """
    blocks, weight = _as_blocks(magnitude, importance)
    largest = functional.max_pool1d(magnitude, NVFP4_BLOCK)
    top = _code_below(largest / (3 * global_scale)).clamp_(min=_LARGEST_ODD_CODE)
    best = top
    least = torch.full_like(largest, torch.inf)
    for below in range(_CODES_PER_BINADE):
        code = (top - below).clamp_(min=1)
        error = _block_error(blocks, _code_value(code) * global_scale, weight)
        better = error < least
        best, least = torch.where(better, code, best), torch.where(better, error, least)
    best = _search_saturating(blocks, weight, top - _CODES_PER_BINADE, best, least, global_scale)
    one = torch.tensor(1.0).to(torch.float8_e4m3fn).view(torch.uint8).item()
    return best.masked_fill_(largest == 0, one).to(torch.uint8).view(torch.float8_e4m3fn)


def _search_saturating(
    blocks: Tensor,
    weight: Tensor | None,
    code: Tensor,
    best: Tensor,
    least: Tensor,
    global_scale: Tensor,
) -> Tensor:
    # go down from `code` as long as what is cut off beyond 6 costs less than the best whole error
    flat, code, least = blocks.reshape(-1, NVFP4_BLOCK), code.flatten(), least.flatten()
    best = best.flatten()
    index = torch.arange(len(flat), device=flat.device)
    while True:
        index = index[code[index] >= 1]
        values = flat[index]
        step = _code_value(code[index]) * global_scale
        values_weight = None if weight is None else weight[index % len(weight)]
        cut_off = (values - E2M1_MAX * step[:, None]).clamp_(min=0)
        worth_it = _weighted_squares(cut_off, values_weight) < least[index]
        index = index[worth_it]
        if not len(index):
            return best.view(blocks.shape[:-1])
        if values_weight is not None:
            values_weight = values_weight[worth_it]
        error = _block_error(values[worth_it], step[worth_it], values_weight)
        better = error < least[index]
        improved = index[better]
        best[improved], least[improved] = code[improved], error[better]
        code = code - 1


def _as_blocks(magnitude: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    weight = None if importance is None else importance.view(-1, NVFP4_BLOCK)
    return magnitude.unflatten(-1, (-1, NVFP4_BLOCK)), weight


def _block_error(blocks: Tensor, step: Tensor, weight: Tensor | None) -> Tensor:
    scaled = blocks / step[..., None]
    return _weighted_squares(scaled.sub_(round_to_e2m1(scaled)), weight) * step.square()


def _weighted_squares(differences: Tensor, weight: Tensor | None) -> Tensor:
    squares = differences.square_()
    if weight is not None:
        squares = squares.mul_(weight)
    # a product with ones: twice as fast on a CPU as summing rows of 16
    return squares @ squares.new_ones(NVFP4_BLOCK)


def _to_e4m3(scale: Tensor) -> Tensor:
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale.clamp_(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def _code_below(scale: Tensor) -> Tensor:
    """Return int32 codes of the largest E4M3 values not above ``scale``, at least 1."""
    nearest = scale.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
    code = nearest.view(torch.uint8).to(torch.int32)
    return code.sub_((nearest.float() > scale).to(torch.int32)).clamp_(1, _LARGEST_CODE)


def _code_value(code: Tensor) -> Tensor:
    return code.to(torch.uint8).view(torch.float8_e4m3fn).float()
