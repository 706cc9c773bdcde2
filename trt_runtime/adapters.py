"""Low-rank factors that run beside the Linears of a block, and the inputs that take them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from .contract import LORA_DOWN, LORA_UP, TensorSpec
from .errors.run import AdapterError
from .spec import MAX_LORA_RANK, RANK_TILE


@dataclass(frozen=True)
class LowRank:
    """What is added to a Linear: ``y + (x @ down) @ up``, ``x`` as the Linear's GEMM gets it.

    Attributes:
        down: ``[K, R]``.
        up: ``[R, N]``.
    """

    down: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        """Number of directions R."""
        return self.down.shape[1]


Adapters = Mapping[str, Mapping[str, LowRank]]
"""By block, then by Linear."""


def factor_inputs(
    block: str, specs: Sequence[TensorSpec], linears: Mapping[str, LowRank]
) -> dict[str, torch.Tensor]:
    """Return what goes into the factor inputs of a block's variant.

    Ranks are padded with zeros to whole tiles, ``[K, R, 16]`` and ``[R, 16, N]``, and Linears
    without an adapter get factors of zeros: neither changes a sum.

    Args:
        block: For errors.
        specs: Inputs of the variant.
        linears: Adapter by Linear.

    Raises:
        AdapterError: An unknown Linear, a shape that does not fit, or a rank above the limit.
    """
    shapes = factor_shapes(specs)
    unknown = sorted(linears.keys() - shapes.keys())
    if unknown:
        raise AdapterError(block, unknown[0], "the block has no such Linear")
    inputs = {}
    for linear, (width, outputs) in shapes.items():
        factors = linears.get(linear)
        if factors is None:
            factors = LowRank(torch.zeros(width, 1), torch.zeros(1, outputs))
        _check(block, linear, factors, width, outputs)
        padding = -factors.rank % RANK_TILE
        pad = torch.nn.functional.pad
        down = pad(factors.down, (0, padding))
        up = pad(factors.up, (0, 0, 0, padding))
        inputs[linear + LORA_DOWN] = down.unflatten(1, (-1, RANK_TILE))
        inputs[linear + LORA_UP] = up.unflatten(0, (-1, RANK_TILE))
    return inputs


def factor_shapes(specs: Sequence[TensorSpec]) -> dict[str, tuple[int, int]]:
    """Return ``(K, N)`` by Linear, as a variant's inputs say."""
    by_name = {spec.name: spec.shape for spec in specs}
    linears = [n.removesuffix(LORA_DOWN) for n in by_name if n.endswith(LORA_DOWN)]
    shapes = {}
    for linear in linears:
        width, outputs = by_name[linear + LORA_DOWN][0], by_name[linear + LORA_UP][-1]
        shapes[linear] = (int(width), int(outputs))
    return shapes


def _check(block: str, linear: str, factors: LowRank, width: int, outputs: int) -> None:
    down, up, rank = tuple(factors.down.shape), tuple(factors.up.shape), factors.rank
    if down != (width, rank) or up != (rank, outputs):
        raise AdapterError(
            block, linear, f"factors {list(down)} and {list(up)} do not fit {width} to {outputs}"
        )
    if not 1 <= rank <= MAX_LORA_RANK:
        raise AdapterError(block, linear, f"rank {rank} is not within 1 to {MAX_LORA_RANK}")


class FactorStore:
    """The factors in use by block: on the CPU always, on the device while the engine is loaded."""

    def __init__(self) -> None:
        self._stored: dict[str, dict[str, torch.Tensor]] = {}
        self._placed: dict[str, dict[str, torch.Tensor]] = {}

    @property
    def blocks(self) -> Collection[str]:
        """Blocks that run their variant."""
        return self._stored.keys()

    @property
    def bytes(self) -> int:
        """Size of all factors."""
        return sum(t.nbytes for inputs in self._stored.values() for t in inputs.values())

    def replace(self, inputs: Mapping[str, Mapping[str, torch.Tensor]], dtype: torch.dtype) -> None:
        """Take other factors; they are placed by the next `place`."""
        self._stored = {
            block: {name: tensor.to("cpu", dtype).contiguous() for name, tensor in factors.items()}
            for block, factors in inputs.items()
        }
        self._placed = {}

    def place(self, device: torch.device) -> None:
        """Copy all factors to where blocks run."""
        self._placed = {
            block: {name: tensor.to(device) for name, tensor in factors.items()}
            for block, factors in self._stored.items()
        }

    def release(self) -> None:
        """Drop the copies; the factors stay on the CPU."""
        self._placed = {}

    def inputs_of(self, block: str) -> Mapping[str, torch.Tensor]:
        """Return the placed factors of a block; nothing for a block without adapter."""
        return self._placed.get(block, {})
