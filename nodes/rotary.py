"""cos and sin tables for block plans, from ComfyUI's rotary embedding."""

from __future__ import annotations

import weakref

import torch


class RotaryTables:
    """Turns ``pe`` into ``(cos, sin)`` once per forward pass and shares them between blocks.

    ComfyUI's ``EmbedND`` (0.30, ``ldm/flux/layers.py``) gives one tensor ``[B, 1, S, 64, 2, 2]``
    that every block of a forward pass receives: rotation matrices ``[[cos, -sin], [sin, cos]]``.
    The tables are dropped together with it, so nothing of a run stays on the GPU.
    """

    def __init__(self) -> None:
        self._source: weakref.ref[torch.Tensor] | None = None
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin, each fp32 ``[B, S, 64]``, for ``pe [B, 1, S, 64, 2, 2]``."""
        if self._tables is None or self._source is None or self._source() is not pe:
            matrices = pe[:, 0].float()
            self._tables = (
                matrices[..., 0, 0].contiguous(),
                matrices[..., 1, 0].contiguous(),
            )
            self._source = weakref.ref(pe, self._forget)
        return self._tables

    def _forget(self, source: weakref.ref[torch.Tensor]) -> None:
        if source is self._source:
            self._source = self._tables = None
