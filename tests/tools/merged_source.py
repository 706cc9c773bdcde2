"""A FLUX source with a LoRA added to some Linears, without ComfyUI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from flux_fp4.quant.nvfp4 import NVFP4Weight
from flux_fp4.quant.sources.source import FluxSource, open_source
from safetensors.torch import save_file
from torch import Tensor

Changes = Mapping[str, Tensor]
"""What is added, by full name of the Linear."""


class MergedSource(FluxSource):
    """Another source with changes added in float32."""

    def __init__(self, source: FluxSource, changes: Changes, digest: str = "merged") -> None:
        self.name, self.layout, self.config = source.name, source.layout, source.config
        self.size_bytes, self.shapes = source.size_bytes, source.shapes
        self.source, self._digest = source, digest
        self.changes = {f"{linear}.weight": change for linear, change in changes.items()}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.changes else self.source.dtype(name)

    def tensors(self, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
        loaded = self.source.tensors(names, device)
        for name in self.changes.keys() & loaded.keys():
            loaded[name] = loaded[name].float() + self.changes[name]
        return loaded

    def packed(self, linear: str, device: str = "cpu") -> NVFP4Weight | None:
        return None if f"{linear}.weight" in self.changes else self.source.packed(linear, device)

    def digest(self) -> str:
        return self._digest


def random_changes(source: FluxSource, *linears: str, seed: int = 0) -> dict[str, Tensor]:
    """Changes of rank 2, half as large as the weights."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for linear in linears:
        (weight,) = source.tensors([f"{linear}.weight"]).values()
        rows, columns = weight.shape
        up = torch.randn(rows, 2, generator=generator)
        change = up @ torch.randn(2, columns, generator=generator)
        changes[linear] = change * (0.5 * weight.float().norm() / change.norm())
    return changes


def save_merged(source: Path, changes: Changes, path: Path) -> Path:
    """Write the checkpoint that somebody would have who merged the changes into the file."""
    opened = open_source(source)
    state = {name: value.float() for name, value in opened.tensors(opened.shapes).items()}
    for linear, change in changes.items():
        state[f"{linear}.weight"] += change
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path
