"""Attention masks of ComfyUI's as an input of block plans."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .built_plans import use_built
from .errors import UnsupportedByEngineError

if TYPE_CHECKING:
    from .engine_model import ModelEngine

LOWEST = -30000.0
"""What stands for minus infinity: finite in every type that plans multiply in, so that a token
which may look at nothing gets an average and not NaN, and far below any other score."""


class AttentionMasks:
    """Turns ``attn_mask`` into the ``mask`` input, once per forward pass for all blocks.

    An engine's plain plans take no mask. The first mask switches the whole engine to plans that do,
    which are built then, and calls without mask get one that changes nothing: two sets of plans
    would take twice the memory. After a sampling without any mask the plain plans come back.
    """

    def __init__(self, engine: ModelEngine) -> None:
        self._engine = engine
        self._seen = False
        self._source: weakref.ref[Tensor] | None = None
        self._mask: Tensor | None = None

    def begin_sampling(self) -> None:
        """Go back to plain plans if the sampling before had no mask."""
        selection = self._engine.selection
        if selection.masked and not self._seen:
            use_built(self._engine, replace(selection, masked=False))
        self._seen = False
        self._source = self._mask = None

    def inputs(self, attn_mask: Tensor | None, x: Tensor, tokens: int) -> dict[str, Tensor]:
        """Return the input for a block, or nothing while plain plans run.

        Args:
            attn_mask: None, or ``[S, S]``, ``[B, S, S]`` or ``[B, 1, S, S]``: booleans that say who
                may look at whom, or numbers to add to the scores.
            x: Tokens of the block, for type and device.
            tokens: Number S of text and image tokens together.

        Raises:
            UnsupportedByEngineError: The mask has another shape.
        """
        if attn_mask is None:
            return {"mask": self._empty(x, tokens)} if self._engine.selection.masked else {}
        self._seen = True
        if not self._engine.selection.masked:
            use_built(self._engine, replace(self._engine.selection, masked=True))
        if self._mask is None or self._source is None or self._source() is not attn_mask:
            self._mask = additive(attn_mask, x.dtype, tokens).to(x.device)
            self._source = weakref.ref(attn_mask, self._forget)
        return {"mask": self._mask}

    def _empty(self, x: Tensor, tokens: int) -> Tensor:
        shape = (1, 1, tokens, tokens)
        if self._source is not None or self._mask is None or self._mask.shape != shape:
            self._mask = torch.zeros(shape, dtype=x.dtype, device=x.device)
            self._source = None
        return self._mask

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if source is self._source:
            self._source = self._mask = None


def additive(attn_mask: Tensor, dtype: torch.dtype, tokens: int) -> Tensor:
    """Return a mask as ``[B, 1, S, S]`` to add to the scores.

    The dimensions are read as ComfyUI's attention does (0.30, ``attention_pytorch``).

    Raises:
        UnsupportedByEngineError: It has another shape, such as one mask per head.
    """
    mask = attn_mask
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 3:
        mask = mask[:, None]
    fits = mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[3] == tokens
    if not fits or mask.shape[2] not in (1, tokens):
        raise UnsupportedByEngineError(
            f"An attention mask of shape {list(attn_mask.shape)} for {tokens} tokens",
            "every block",
            f"Use a mask [{tokens}, {tokens}], the same for all heads",
        )
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, LOWEST)
    else:
        mask = mask.to(dtype).clamp(min=LOWEST)
    return mask.expand(-1, -1, tokens, -1)
