"""Choosing by how much each input channel of an NVFP4 Linear is scaled before it is rounded.

``x * p`` against ``weight / p``: the product stays, the roundings change. ModelOpt's ``awq_lite``
finds a scale by the error of the rounded *weight* alone. Where inputs are NVFP4 too, that can make
them much worse: on the trained small model its choice cost 2 dB of the velocity
(docs/adr/0007-smoothing-by-output-error.md). So its scale is one candidate here, beside those of
SmoothQuant and none at all, and the error of the output decides with both roundings in it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from .e2m1 import E2M1_MAX
from .nvfp4 import E4M3_MAX, fake_quantize_activation, fake_quantize_weight

_MIGRATION = (0.25, 0.5, 0.75, 1.0)
"""Strengths alpha of SmoothQuant (Xiao et al. 2022, arXiv:2211.10438, eq. 4)."""


def best_scale(weight: Tensor, rows: Tensor, channel_amax: Tensor, awq: Tensor) -> Tensor:
    """Return the scale with the smallest error of the output.

    Args:
        weight: Some or all outputs of a Linear, ``[N, K]``.
        rows: Inputs ``[R, K]``.
        channel_amax: Largest magnitude of each input channel, ``[K]``.
        awq: What ``awq_lite`` chose, ``[K]``.

    Returns:
        bf16 ``[K]``: the plan multiplies in bf16. All ones where no candidate is better than none.
    """
    weight, rows = weight.float(), rows.float()
    expected = functional.linear(rows, weight)
    # relative to each token: else the few largest tokens decide alone
    size = expected.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    best, least = torch.ones_like(awq, dtype=torch.bfloat16), torch.inf
    for candidate in (best, awq.bfloat16(), *_smoothquant(weight, channel_amax.to(weight))):
        scale = candidate.float()
        x = rows * scale
        global_scale = x.abs().amax() / (E2M1_MAX * E4M3_MAX)
        actual = functional.linear(
            fake_quantize_activation(x, global_scale), fake_quantize_weight(weight / scale)
        )
        error = torch.sum((actual - expected).square().sum(1) / size).item()
        if error < least:
            best, least = candidate, error
    return best


def _smoothquant(weight: Tensor, channel_amax: Tensor) -> Iterator[Tensor]:
    tiny = torch.finfo(torch.float32).tiny ** 0.5
    of_input = channel_amax.clamp(min=tiny)
    of_weight = weight.abs().amax(0).clamp(min=tiny)
    for alpha in _MIGRATION:
        scale = of_weight ** (1 - alpha) / of_input**alpha
        # only ratios between channels matter; around 1, bf16 and the scales have most room
        scale = scale / (scale.amin() * scale.amax()).sqrt()
        yield scale.clamp(1e-4, 1e4).bfloat16()
