"""Choosing by how much each input channel of an NVFP4 Linear is scaled before it is rounded.

``x * p`` against ``weight / p``: the product stays, the roundings change. ModelOpt's ``awq_lite``
finds a scale by the error of the rounded *weight* alone, and inputs are NVFP4 too: with it the
trained small model's velocity was almost 3 dB worse than without smoothing
(docs/adr/0007-smoothing-by-output-error.md). So its scale is one candidate here, beside those of
SmoothQuant and none at all, and the error of the output decides with both roundings in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from .e2m1 import E2M1_MAX
from .nvfp4 import E4M3_MAX, Search, fake_quantize_activation, quantize_weight

_MIGRATION = (0.25, 0.5, 0.75, 1.0)
"""Strengths alpha of SmoothQuant (Xiao et al. 2022, arXiv:2211.10438, eq. 4)."""

_WORTHWHILE = 0.9
"""Part of the unsmoothed error that a scale must stay below. The rows are a sample: what is better
by less on them need not be on other pictures (the ADR says how it was chosen)."""


def best_scale(
    linear: str,
    weight: Tensor,
    rows: Tensor,
    channel_amax: Tensor,
    awq: Tensor,
    search: Search,
    heartbeat: Callable[[], None],
) -> Tensor:
    """Return the scale with the smallest error of the output.

    Args:
        linear: Name for errors.
        weight: Some or all outputs of a Linear, ``[N, K]``.
        rows: Inputs ``[R, K]``.
        channel_amax: Largest magnitude of each input channel, ``[K]``.
        awq: What ``awq_lite`` chose, ``[K]``.
        search: How the weight's block scales will be found.
        heartbeat: Called before each try; may raise to cancel.

    Returns:
        bf16 ``[K]``: the plan multiplies in bf16. All ones where no candidate is clearly better.
    """
    weight, rows = weight.float(), rows.float()
    expected = functional.linear(rows, weight)
    # relative to each token: else the few largest tokens decide alone
    size = expected.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)

    def error(scale: Tensor) -> float:
        heartbeat()
        x = rows * scale.float()
        packed = quantize_weight(weight / scale.float(), linear, search, x.square().mean(0))
        rounded = fake_quantize_activation(x, x.abs().amax() / (E2M1_MAX * E4M3_MAX))
        noise = functional.linear(rounded, packed.dequantize()) - expected
        return torch.sum(noise.square().sum(1) / size).item()

    best = torch.ones_like(awq, dtype=torch.bfloat16)
    least = _WORTHWHILE * error(best)
    for candidate in (awq.bfloat16(), *_smoothquant(weight, channel_amax.to(weight))):
        found = error(candidate)
        if found < least:
            best, least = candidate, found
    return best


def _smoothquant(weight: Tensor, channel_amax: Tensor) -> Iterator[Tensor]:
    of_weight = weight.abs().amax(0)
    # a channel that is never used has no size to balance, and must not decide the others' range
    used = (channel_amax > 0) & (of_weight > 0)
    if not used.any():
        return
    for alpha in _MIGRATION:
        scale = of_weight ** (1 - alpha) / channel_amax**alpha
        # only ratios between channels matter; around 1, bf16 and the scales have most room
        scale = scale / (scale[used].amin() * scale[used].amax()).sqrt()
        yield torch.where(used, scale.clamp(1e-4, 1e4), 1.0).bfloat16()
