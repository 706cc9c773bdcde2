"""A checkpoint file with ComfyUI's weight patches merged into it, one block at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..quant.nvfp4 import NVFP4Weight
from ..quant.sources.source import FluxSource
from .weight_changes import WEIGHT, Patch, merged_weight


class ChangedSource(FluxSource):
    """A source whose Linears are what ComfyUI's own merge makes of them, in float32."""

    def __init__(
        self, source: FluxSource, patches: Mapping[str, Sequence[Patch]], digest: str
    ) -> None:
        """Wrap a source; nothing is loaded or merged yet.

        Args:
            source: The weights without patches.
            patches: By full name of the Linear.
            digest: Of source and patches together.
        """
        self.name, self.layout, self.config = source.name, source.layout, source.config
        self.size_bytes, self.shapes = source.size_bytes, source.shapes
        self._source, self._digest = source, digest
        self._patches = {f"{linear}{WEIGHT}": list(found) for linear, found in patches.items()}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._patches else self._source.dtype(name)

    def tensors(self, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
        loaded = self._source.tensors(names, device)
        for name in self._patches.keys() & loaded.keys():
            # FP4 is rounded to from the exact sum, as in ModelSource
            base = loaded[name].float()
            linear = name.removesuffix(WEIGHT)
            loaded[name] = merged_weight(linear, self._patches[name], base).float()
        return loaded

    def packed(self, linear: str, device: str = "cpu") -> NVFP4Weight | None:
        changed = f"{linear}{WEIGHT}" in self._patches
        return None if changed else self._source.packed(linear, device)

    def digest(self) -> str:
        return self._digest
