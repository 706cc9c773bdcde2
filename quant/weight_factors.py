"""Low-rank changes of stored weights: what a LoRA adds to a Linear that stays quantized.

A change of the original weight is ``up @ down``. The Linear may multiply its input by
``pre_quant_scale`` before it rounds it, and have a branch of SVDQuant's already; both are taken
into account here, so that one pair of factors beside the quantized weight does it all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .emulation import emulated_linear
from .low_rank import randomized_svd

TOLERANCE = 1e-3
"""Relative error at which further directions are not worth their time: below what rounding the
factors to bf16 costs (2^-9, 0.2 % of a value)."""


@dataclass(frozen=True)
class WeightFactors:
    """A change of a weight ``[N, K]``: ``up @ down``.

    Attributes:
        up: ``[N, r]``.
        down: ``[r, K]``.
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """Number of directions r."""
        return self.down.shape[0]


def joined(parts: Sequence[WeightFactors]) -> WeightFactors:
    """Return the sum of changes: their directions side by side, nothing is rounded."""
    if len(parts) == 1:
        return parts[0]
    return WeightFactors(
        torch.cat([part.up for part in parts], dim=1), torch.cat([part.down for part in parts])
    )


def factorized(change: Tensor, max_rank: int, seed: int = 0) -> tuple[WeightFactors, float]:
    """Find the best factors of a change.

    As few directions as reach a relative error of ``TOLERANCE``, or ``max_rank`` of them.

    Args:
        change: ``[N, K]``, fp32.
        max_rank: Most directions.
        seed: Of the randomized search: the same change and seed give the same factors.

    Returns:
        The factors and their relative error ``|change - up @ down| / |change|``.
    """
    size = torch.linalg.vector_norm(change)
    if size == 0:
        return WeightFactors(change.new_zeros(len(change), 1), change[:1] * 0), 0.0
    rank = min(max_rank, *change.shape)
    left, sizes, right = randomized_svd(change, rank, seed)
    # what is left after r directions, from their sizes: |change|^2 - sum of squares
    energy = sizes[:rank].double().square().cumsum(0)
    missing = (1 - energy / size.double().square()).clamp(min=0).sqrt()
    enough = torch.nonzero(missing <= TOLERANCE)
    kept = int(enough[0]) + 1 if len(enough) else rank
    root = sizes[:kept].sqrt()
    factors = WeightFactors(left[:, :kept] * root, root[:, None] * right[:kept])
    error = torch.linalg.vector_norm(torch.addmm(change, factors.up, factors.down, alpha=-1))
    return factors, (error / size).item()


def stored_weight(linear: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what a stored Linear multiplies its original input with, fp32 ``[N, K]``.

    ``(W + up @ down) * pre_quant_scale`` with the dequantized ``W``.

    Args:
        linear: Name relative to the block.
        tensors: Tensors by name relative to the block.
    """
    emulated = emulated_linear(linear, tensors, None)
    weight = emulated.weight
    if emulated.branch is not None:
        down, up = emulated.branch
        weight = weight + up.float() @ down.float()
    scale = emulated.pre_quant_scale
    return weight if scale is None else weight * scale.float()


def beside_stored(
    linear: str, tensors: Mapping[str, Tensor], change: WeightFactors | None
) -> WeightFactors | None:
    """Return factors for the input as the quantized GEMM gets it, with SVDQuant's branch in them.

    Args:
        linear: Name relative to the block.
        tensors: Tensors by name relative to the block; weights are not looked at.
        change: Of the original weight; None for no change.

    Returns:
        fp32 factors; None if there is neither a change nor a branch.
    """
    parts = []
    if f"{linear}.svd_down" in tensors:
        up, down = (tensors[f"{linear}.{name}"].float() for name in ("svd_up", "svd_down"))
        parts.append(WeightFactors(up, down))
    if change is not None:
        scale = tensors.get(f"{linear}.pre_quant_scale")
        down = change.down if scale is None else change.down / scale.float()
        parts.append(WeightFactors(change.up, down))
    return joined(parts) if parts else None
