"""What calibration learns about a block: ranges of its inputs, and a few of them to try things on.

Statistics depend on the model and the samples alone, so one set serves every recipe: scales come
from the quantiles, searches weigh errors by the mean squares, AWQ and the report run on the rows,
and sensitivity is measured on the probes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .calibration import SampleState
from .errors.calibration import OTHER_SAMPLES, CalibrationError, NotFiniteError
from .flux.blocks import DoubleStreamBlock, SingleStreamBlock

ROWS = 128
"""Inputs kept per Linear, spread evenly over samples and tokens: the SQNR of a Linear's output on
128 rows is within 0.3 dB of that on all tokens (tests/unit/quant/test_statistics.py)."""

PROBES = 2
"""Samples of which every block keeps its input: one with little noise, one with much."""

PROBE_TOKENS = 64
"""Most tokens that a probe keeps of each stream."""

_GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Its multiples, modulo 1, fill the interval evenly however many there are."""

QUANTILES = 1001
"""Stored quantiles of token maxima: per mille, the last one is the maximum."""

Block = DoubleStreamBlock | SingleStreamBlock


@dataclass(frozen=True)
class RangeStatistics:
    """How large a tensor's values get.

    Attributes:
        quantiles: fp32 ``[1001]``: quantiles, per mille, of the largest magnitude of each token.
    """

    quantiles: Tensor

    @property
    def amax(self) -> float:
        """Largest magnitude of all."""
        return self.quantiles[-1].item()

    def at(self, percentile: float) -> float:
        """Return the magnitude that ``percentile`` percent of tokens do not exceed."""
        position = percentile / 100 * (QUANTILES - 1)
        low = math.floor(position)
        if low == QUANTILES - 1:
            return self.amax
        pair = self.quantiles[low : low + 2].double()
        return (pair[0] + (position - low) * (pair[1] - pair[0])).item()


@dataclass(frozen=True)
class LinearStatistics:
    """What a Linear's input looks like.

    Attributes:
        range: Over all tokens.
        channel_amax: Largest magnitude of each channel, fp32 ``[K]``.
        mean_square: Mean square of each channel, fp32 ``[K]``.
        rows: Inputs of some tokens, bf16 ``[R, K]``.
    """

    range: RangeStatistics
    channel_amax: Tensor
    mean_square: Tensor
    rows: Tensor


@dataclass(frozen=True)
class BlockStatistics:
    """What calibration keeps of a block.

    Attributes:
        linears: By name relative to the block.
        attention: Of ``q`` and ``k`` after RoPE and of ``v``.
        probes: Inputs of the block in a few samples, thinned out to ``PROBE_TOKENS`` tokens.
    """

    linears: dict[str, LinearStatistics]
    attention: dict[str, RangeStatistics]
    probes: tuple[SampleState, ...]


class BlockObserver:
    """Collects the statistics of a block while samples run through it; a context manager."""

    def __init__(self, name: str, block: Block, linears: Sequence[str], samples: int) -> None:
        """Prepare to observe.

        Args:
            name: Of the block, for errors.
            block: Must run ``samples`` samples inside of the context.
            linears: Names relative to the block.
            samples: How many there will be: each contributes the same number of rows.
        """
        self._name = name
        self._block = block
        rows = -(-ROWS // samples)
        self._linears = {linear: _LinearObserver(rows) for linear in linears}
        self._attention: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> BlockObserver:
        """Start observing."""
        for linear, observer in self._linears.items():
            module = self._block.get_submodule(linear)
            self._handles.append(module.register_forward_pre_hook(observer))
        self._handles.append(self._block.attention.register_forward_pre_hook(self._observe_qkv))
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop observing."""
        for handle in self._handles:
            handle.remove()

    def statistics(self, probes: Sequence[SampleState]) -> BlockStatistics:
        """Return what was seen, on the CPU.

        Args:
            probes: States before the block, see ``probe_states``.

        Raises:
            NotFiniteError: A value was NaN or infinite.
            CalibrationError: A Linear saw only zeros.
        """
        linears = {}
        for linear, observer in self._linears.items():
            subject = f"The input of '{self._name}.{linear}'"
            linears[linear] = observer.statistics(subject)
            if linears[linear].range.amax == 0:
                raise CalibrationError(
                    f"every input of '{self._name}.{linear}' was zero",
                    "a sample must reach each layer",
                )
        attention = {
            part: _range(seen, f"'{part}' of the attention of '{self._name}'")
            for part, seen in self._attention.items()
        }
        return BlockStatistics(linears, attention, tuple(probes))

    def _observe_qkv(self, module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
        for part, tensor in zip("qkv", qkv, strict=True):  # [B, heads, S, head_dim]
            self._attention[part].append(tensor.abs().amax(dim=(1, 3)).flatten().float())


class _LinearObserver:
    def __init__(self, rows: int) -> None:
        self._rows_per_sample = rows
        self._token_amax: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._channel_amax: Tensor | None = None
        self._square_sum: Tensor | None = None
        self._tokens = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].detach().flatten(0, -2)
        magnitude = x.abs()
        self._token_amax.append(magnitude.amax(dim=1).float())
        channel_amax = magnitude.amax(dim=0).float()
        square_sum = x.float().square().sum(dim=0, dtype=torch.float64)
        if self._channel_amax is None or self._square_sum is None:
            self._channel_amax, self._square_sum = channel_amax, square_sum
        else:
            self._channel_amax = torch.maximum(self._channel_amax, channel_amax)
            self._square_sum += square_sum
        self._tokens += len(x)
        # each sample shows tokens at other places: the same place in every text is often padding
        offset = len(self._rows) * _GOLDEN_RATIO % 1
        self._rows.append(x[spread(len(x), self._rows_per_sample, offset)].bfloat16().cpu())

    def statistics(self, subject: str) -> LinearStatistics:
        assert self._channel_amax is not None
        assert self._square_sum is not None
        return LinearStatistics(
            _range(self._token_amax, subject),
            self._channel_amax.cpu(),
            (self._square_sum / self._tokens).float().cpu(),
            torch.cat(self._rows),
        )


def spread(length: int, count: int, offset: float = 0.5) -> Tensor:
    """Return at most ``count`` indices below ``length``, evenly spaced.

    Args:
        length: How many there are to choose from.
        count: How many to choose.
        offset: Where in its equal part of the length each one lies, from 0 to below 1.
    """
    count = min(length, count)
    places = (torch.arange(count, dtype=torch.float64) + offset) * length / count
    return places.floor().long()


def probe_states(states: Sequence[SampleState]) -> tuple[SampleState, ...]:
    """Pick the probes out of all samples before a block, on the CPU in bf16.

    Samples are ordered by noise within each picture, so a quarter and three quarters of the way
    through the list differ in noise and picture.
    """
    chosen = sorted({len(states) * (2 * index + 1) // (2 * PROBES) for index in range(PROBES)})
    return tuple(_thinned(states[index]) for index in chosen)


def _thinned(state: SampleState) -> SampleState:
    if state.txt is None:
        kept = spread(state.img.shape[1], 2 * PROBE_TOKENS)
        img, txt = state.img[:, kept], None
    else:
        txt_tokens = state.txt.shape[1]
        txt_kept = spread(txt_tokens, PROBE_TOKENS)
        img_kept = spread(state.img.shape[1], PROBE_TOKENS)
        kept = torch.cat((txt_kept, txt_tokens + img_kept))
        img, txt = state.img[:, img_kept], _small(state.txt[:, txt_kept])
    cos, sin = state.cos[:, kept].cpu(), state.sin[:, kept].cpu()
    shared = None if state.shared_mods is None else _small(state.shared_mods)
    return SampleState(_small(img), txt, _small(state.vec), cos, sin, shared)


def _small(x: Tensor) -> Tensor:
    return x.bfloat16().cpu()


def _range(seen: Sequence[Tensor], subject: str) -> RangeStatistics:
    values = torch.cat(list(seen)).cpu()
    if not torch.isfinite(values).all():
        raise NotFiniteError(subject, OTHER_SAMPLES)
    # not torch.quantile: it interpolates with rounding, and takes 16 million values at most
    ordered = values.sort().values
    index = torch.linspace(0, len(ordered) - 1, QUANTILES, dtype=torch.float64).ceil().long()
    return RangeStatistics(ordered[index].contiguous())
