"""Weight patches of ComfyUI's as low-rank factors beside the engine's quantized Linears.

Plain LoRAs go in as their own factors. Everything else (LoHa, LoKr, DoRA, differences, ...) is
computed by ComfyUI's own `calculate_weight` on the stored weight, and the change it makes is
factorized.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import comfy.lora
import comfy.weight_adapter
import torch
from torch import Tensor

from .errors import WeightChangeError

if TYPE_CHECKING:
    from ..quant.weight_factors import WeightFactors
    from ..trt_runtime.adapters import LowRank

logger = logging.getLogger(__name__)

PREFIX = "diffusion_model."
WEIGHT = ".weight"
MAX_LOSS = 0.3
"""Largest part of a change that factors may lose. Halving an adapter's strength is a loss of 0.5,
and users see that; what is smaller is reported in the log."""

WORTH_REPORTING = 0.01

Patch = tuple[float, Any, float, Any, Any]
"""What `ModelPatcher.patches` holds: strength, change, strength of the weight before it, the slice
of the weight that is changed, and a function applied to the change."""


class StoredLinears(Protocol):
    """What is needed of a quantized checkpoint."""

    def linear_tensors(self, linear: str, weight: bool = True) -> dict[str, Tensor]: ...
    def linear_shape(self, linear: str) -> tuple[int, int]: ...


def check_patch(key: str, patch: Any, offset: Any, shape: torch.Size) -> None:
    """Refuse what can never become factors, when a node adds it.

    Args:
        key: Full name of the weight.
        patch: The change.
        offset: ``(dim, start, length)`` of a slice, or None.
        shape: Of the weight.

    Raises:
        WeightChangeError: It changes the shape, or is of a kind that ComfyUI does not know.
    """
    wanted = torch.Size(shape)
    if offset is not None:
        dim, _, length = offset
        wanted = torch.Size([*shape[:dim], length, *shape[dim + 1 :]])
    found = _shape_after(patch, key, wanted)
    if found != wanted:
        raise WeightChangeError(
            _name(key), f"it makes the weight {list(found)}, and the engine has {list(wanted)}"
        )


def acting_patches(
    patches: Mapping[str, Sequence[Patch]], linears_of: Mapping[str, Sequence[str]]
) -> dict[str, list[Patch]]:
    """Return the patches that change Linears inside plans, by full name of the Linear.

    Left out are those of strength 0, so that they give the base again, bit for bit.
    """
    names = [f"{block}.{linear}" for block, linears in linears_of.items() for linear in linears]
    found = {
        name: [patch for patch in patches.get(f"{PREFIX}{name}{WEIGHT}", ()) if _acts(patch)]
        for name in names
    }
    return {name: acting for name, acting in found.items() if acting}


def merged_weight(name: str, patches: Sequence[Patch], base: Tensor) -> Tensor:
    """Return what ComfyUI makes of a weight.

    Args:
        name: Full name of the Linear.
        patches: In their order.
        base: The weight in float32; unchanged.

    Raises:
        WeightChangeError: Nothing in the patches can be applied, or the result is not finite.
    """
    key = f"{PREFIX}{name}{WEIGHT}"
    # ComfyUI's function works in place; "model_as_lora" patches ask for the weight before them
    changed: Tensor = comfy.lora.calculate_weight(
        list(patches), base.clone(), key, original_weights={key: [(base, lambda w, **_: w)]}
    )
    if torch.equal(changed.float(), base):
        # ComfyUI logs what it cannot apply and goes on without it
        raise WeightChangeError(name, "ComfyUI finds nothing in it to apply (see the log)")
    # quicker than isfinite() of every number; a NaN is both the least and the greatest
    if not torch.stack(torch.aminmax(changed)).isfinite().all():
        raise WeightChangeError(name, "it makes the weight NaN or infinite")
    return changed


def branches(
    patches: Mapping[str, Sequence[Patch]],
    checkpoint: StoredLinears,
    linears_of: Mapping[str, Sequence[str]],
    max_rank: int,
    device: torch.device,
) -> dict[str, dict[str, LowRank]]:
    """Return the factors of all patched Linears, by block and Linear.

    Blocks that no patch changes are left out. In those that remain, Linears with an SVDQuant branch
    have it among their factors: the plan variant that takes factors has no branch of its own.

    Args:
        patches: By full name of the weight; names outside of ``linears_of`` are not looked at.
        checkpoint: Where the quantized weights are.
        linears_of: Names of the Linears in plans by block.
        max_rank: Largest rank that a Linear's branch may have.
        device: Where to factorize.

    Raises:
        WeightChangeError: Too large a part of a change would be lost.
    """
    adapters = {}
    acting = acting_patches(patches, linears_of)
    for block, linears in linears_of.items():
        changes = {
            linear: _change(
                f"{block}.{linear}",
                acting.get(f"{block}.{linear}", ()),
                checkpoint,
                max_rank,
                device,
            )
            for linear in linears
        }
        if any(change is not None for change in changes.values()):
            adapters[block] = _branches_of_block(block, changes, checkpoint)
    return adapters


def _branches_of_block(
    block: str, changes: Mapping[str, WeightFactors | None], checkpoint: StoredLinears
) -> dict[str, LowRank]:
    from ..quant.weight_factors import beside_stored
    from ..trt_runtime.adapters import LowRank

    found = {}
    for linear, change in changes.items():
        tensors = checkpoint.linear_tensors(f"{block}.{linear}", weight=False)
        factors = beside_stored(linear, tensors, change)
        if factors is not None:
            found[linear] = LowRank(factors.down.mT, factors.up.mT)
    return found


def _change(
    name: str,
    patches: Sequence[Patch],
    checkpoint: StoredLinears,
    max_rank: int,
    device: torch.device,
) -> WeightFactors | None:
    """Return what the patches of one Linear add to its original weight."""
    from ..quant.weight_factors import factorized, joined

    if not patches:
        return None
    shape = checkpoint.linear_shape(name)
    room = max_rank - _branch_rank(name, checkpoint)
    exact = [_plain_lora(patch, shape) for patch in patches]
    if all(_adds_only(patch) for patch in patches):
        others = [p for p, factors in zip(patches, exact, strict=True) if factors is None]
        plain = [factors for factors in exact if factors is not None]
    else:
        # a patch that looks at the weight sees what the patches before it made of that
        others, plain = list(patches), []
    room -= sum(factors.rank for factors in plain)
    if plain and (room < 0 or (others and room < 1)):
        total = max_rank - room
        raise WeightChangeError(
            name, f"its adapters have rank {total} together, and an engine takes {max_rank}"
        )
    if others:
        change = _computed(name, others, checkpoint)
        factors, loss = factorized(change.to(device), room)
        _report_loss(name, loss, factors.rank)
        plain.append(type(factors)(factors.up.cpu(), factors.down.cpu()))
    return joined(plain)


def _computed(name: str, patches: Sequence[Patch], checkpoint: StoredLinears) -> Tensor:
    from ..quant.weight_factors import stored_weight

    linear = name.split(".", 2)[2]
    base = stored_weight(linear, checkpoint.linear_tensors(name))
    return merged_weight(name, patches, base).float() - base


def _report_loss(name: str, loss: float, rank: int) -> None:
    if loss > MAX_LOSS:
        raise WeightChangeError(
            name, f"{rank} directions hold {100 * (1 - loss):.0f} % of its change only"
        )
    if loss > WORTH_REPORTING:
        logger.warning(
            "%s: %d directions beside the engine hold all but %.1f %% of the weight's change",
            name,
            rank,
            100 * loss,
        )


def _acts(patch: Patch) -> bool:
    strength, change, strength_model, _, _ = patch
    is_set = isinstance(change, tuple) and len(change) == 2 and change[0] == "set"
    return strength != 0 or strength_model != 1 or is_set


def _plain_lora(patch: Patch, shape: tuple[int, int]) -> WeightFactors | None:
    """Return the factors of a patch that is nothing but ``strength * alpha / r * up @ down``."""
    from ..quant.weight_factors import WeightFactors

    strength, adapter, _, offset, function = patch
    if not isinstance(adapter, comfy.weight_adapter.LoRAAdapter) or function is not None:
        return None
    # the order of LoRAAdapter.weights in ComfyUI 0.30
    up, down, alpha, mid, dora_scale, reshape = adapter.weights
    if mid is not None or dora_scale is not None or reshape is not None:
        return None
    up, down = (factor.flatten(1).to("cpu", torch.float32) for factor in (up, down))
    scale = strength * (1.0 if alpha is None else float(alpha) / len(down))
    up = up * scale
    if offset is None:
        return WeightFactors(up, down)
    dim, start, length = offset
    before_after = (start, shape[dim] - start - length)
    pad = torch.nn.functional.pad
    if dim == 0:
        return WeightFactors(pad(up, (0, 0, *before_after)), down)
    return WeightFactors(up, pad(down, before_after))


def _adds_only(patch: Patch) -> bool:
    """Tell whether what a patch adds does not depend on the weight."""
    _, change, strength_model, _, function = patch
    if strength_model != 1 or function is not None:
        return False
    if isinstance(change, comfy.weight_adapter.LoRAAdapter):
        return change.weights[4] is None and change.weights[5] is None
    if isinstance(change, comfy.weight_adapter.LoHaAdapter):
        return change.weights[7] is None
    if isinstance(change, comfy.weight_adapter.LoKrAdapter):
        return change.weights[8] is None
    return isinstance(change, tuple) and (len(change) == 1 or change[0] == "diff")


def _shape_after(patch: Any, key: str, shape: torch.Size) -> torch.Size:
    if isinstance(patch, comfy.weight_adapter.WeightAdapterBase):
        changed = patch.calculate_shape(key)
        if changed is None and isinstance(patch, comfy.weight_adapter.LoRAAdapter):
            up, down = patch.weights[0].flatten(1), patch.weights[1].flatten(1)
            # ComfyUI reshapes a LoRA of another shape with as many numbers, so that is what counts
            fits = len(up) * down.shape[1] == shape.numel()
            return shape if fits else torch.Size([len(up), down.shape[1]])
        return shape if changed is None else torch.Size(changed)
    if isinstance(patch, tuple):
        value = patch[0] if len(patch) == 1 else patch[1][0]
        return value.shape if isinstance(value, Tensor) else shape
    return shape


def _branch_rank(name: str, checkpoint: StoredLinears) -> int:
    down = checkpoint.linear_tensors(name, weight=False).get(f"{name.split('.', 2)[2]}.svd_down")
    return 0 if down is None else len(down)


def _name(key: str) -> str:
    return key.removeprefix(PREFIX).removesuffix(WEIGHT)
