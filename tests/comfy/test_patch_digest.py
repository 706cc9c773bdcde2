"""Equal patches have equal digests, and whatever changes a merge changes the digest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from blake3 import blake3
from comfy_in_process import import_comfyui
from torch import Tensor

import_comfyui()

import comfy.weight_adapter  # noqa: E402
from flux_fp4.nodes.patch_digest import update_digest  # noqa: E402


def digest(value: Any) -> str:
    digest = blake3()
    update_digest(digest, value)
    return digest.hexdigest()


def patch(
    strength: float = 1.0,
    strength_model: float = 1.0,
    offset: Any = None,
    function: Any = None,
    alpha: float | None = 4.0,
    change: float = 0.0,
    kind: Any = comfy.weight_adapter.LoRAAdapter,
) -> tuple[Any, ...]:
    up, down = torch.ones(8, 2), torch.ones(2, 4)
    down[1, 3] += change
    adapter = kind(set(), (up, down, alpha, None, None, None))
    return strength, adapter, strength_model, offset, function


def scaled_by(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight * factor


def test_equal_patches_are_equal() -> None:
    assert digest(patch()) == digest(patch())
    assert digest(patch(function=scaled_by(2.0))) == digest(patch(function=scaled_by(2.0)))


@pytest.mark.parametrize(
    "other",
    [
        patch(strength=0.5),
        patch(strength_model=0.5),
        patch(offset=(0, 0, 4)),
        patch(alpha=None),
        patch(change=1e-6),
        patch(kind=comfy.weight_adapter.LoHaAdapter),
        patch(function=scaled_by(2.0)),
    ],
    ids=["strength", "model", "slice", "alpha", "last number", "kind", "function"],
)
def test_other_patches_are_not(other: tuple[Any, ...]) -> None:
    assert digest(other) != digest(patch())


def test_functions_differ_by_what_they_hold_and_do() -> None:
    functions = (
        scaled_by(2.0),
        scaled_by(3.0),
        lambda weight: weight + 1,
        lambda weight: weight + 2,
    )
    assert len({digest(patch(function=function)) for function in functions}) == 4


def test_shape_and_type_count() -> None:
    zeros = torch.zeros(4, 2)
    others = (zeros.reshape(2, 4), zeros.to(torch.int32), torch.zeros(4, 2, dtype=torch.bfloat16))
    assert len({digest(value) for value in (zeros, *others)}) == 4
