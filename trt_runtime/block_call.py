"""Inputs of a block against its signature and the profile, and large batches in parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .contract import TensorSpec
from .errors.run import BlockInputError
from .manifest import PlanEntry
from .spec import ShapeProfile

Shapes = list[tuple[str, torch.Size, torch.dtype]]
"""Name, shape and type of every input: what was accepted once is accepted again."""


@dataclass(frozen=True)
class AcceptedCall:
    """How a block runs with inputs of these shapes."""

    entry: PlanEntry
    shapes: Shapes
    batch: int
    parts: int
    as_given: bool
    """The inputs go to the plan as they are: one part, in which all have the same batch."""


def accepted_call(
    entry: PlanEntry, profile: ShapeProfile, inputs: Mapping[str, torch.Tensor], shapes: Shapes
) -> AcceptedCall:
    """Check inputs and decide in how many parts they run.

    Raises:
        BlockInputError: A name, rank, size or type does not match.
        ShapeProfileError: A token count is outside the profile.
    """
    sizes = matched_sizes(entry, inputs)
    check_profile(profile, sizes)
    batch = sizes["B"]
    parts = math.ceil(batch / profile.max_batch)
    as_given = parts == 1 and all(inputs[name].shape[0] == batch for name in _batched(entry))
    return AcceptedCall(entry, shapes, batch, parts, as_given)


def matched_sizes(entry: PlanEntry, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the size of every dynamic axis, after matching all inputs with the signature.

    Raises:
        BlockInputError: a name, rank, size or type does not match.
    """
    expected = {spec.name for spec in entry.inputs}
    if inputs.keys() != expected:
        missing, unknown = sorted(expected - inputs.keys()), sorted(inputs.keys() - expected)
        raise BlockInputError(entry.block, f"missing inputs {missing}, unexpected inputs {unknown}")
    sizes = {"B": max(tensor.shape[0] if tensor.dim() else 1 for tensor in inputs.values())}
    for spec in entry.inputs:
        _match(entry.block, spec, inputs[spec.name], sizes)
    if {"N", "T", "S"} <= sizes.keys() and sizes["S"] != sizes["N"] + sizes["T"]:
        raise BlockInputError(
            entry.block,
            f"{sizes['N']} image and {sizes['T']} text tokens, but rotary tables for {sizes['S']}",
        )
    return sizes


def _match(block: str, spec: TensorSpec, tensor: torch.Tensor, sizes: dict[str, int]) -> None:
    if not tensor.is_floating_point():
        raise BlockInputError(block, f"input '{spec.name}' is {tensor.dtype}, not floating point")
    shape = tuple(tensor.shape)
    fits = len(shape) == len(spec.shape)
    for dim, size in zip(spec.shape, shape):  # noqa: B905  # the ranks were compared
        if isinstance(dim, str):
            allowed = (1, sizes["B"]) if dim == "B" else (sizes.setdefault(dim, size),)
        else:
            allowed = (dim,)
        fits = fits and size in allowed
    if not fits:
        wanted = [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape]
        raise BlockInputError(block, f"input '{spec.name}' is {list(shape)}, expected {wanted}")


def check_profile(profile: ShapeProfile, sizes: Mapping[str, int]) -> None:
    """Raise ShapeProfileError when a token count is outside the profile."""
    for axis in ("N", "T", "S"):
        if axis in sizes:
            profile.range(axis).check(sizes[axis])


def batch_parts(
    entry: PlanEntry, inputs: Mapping[str, torch.Tensor], batch: int, parts: int
) -> list[dict[str, torch.Tensor]]:
    """Give all inputs the whole batch, and split it into parts as equal as possible."""
    bounds = [batch * i // parts for i in range(parts + 1)]
    dynamic = _batched(entry)
    full = {
        name: tensor.expand(batch, *tensor.shape[1:]) if name in dynamic else tensor
        for name, tensor in inputs.items()
    }
    return [
        {name: t[start:end] if name in dynamic else t for name, t in full.items()}
        for start, end in itertools.pairwise(bounds)
    ]


def _batched(entry: PlanEntry) -> set[str]:
    return {spec.name for spec in entry.inputs if spec.shape[:1] == ("B",)}
