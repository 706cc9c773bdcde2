"""Activations of all samples between two blocks, on disk: training needs many, memory holds few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..calibration import SampleState
from ..stack import tokens
from ..whole_files import storing


class StateFiles:
    """One ``SampleState`` per sample, whose tokens lie in memory-mapped files.

    A sample keeps its number of tokens from block to block, so each has one file, written again
    after every block: text first, then the picture, as single blocks see them. The system keeps in
    memory what fits.
    """

    def __init__(self, folder: Path, states: Sequence[SampleState]) -> None:
        """Copy states into files.

        Args:
            folder: Exists, and is the caller's to delete.
            states: Before the first block; on any device.

        Raises:
            DiskFullError, FileWriteError: The system refuses to write.
        """
        self._states = [
            _mapped(state, folder / f"{index}.tokens") for index, state in enumerate(states)
        ]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._states)

    def __getitem__(self, index: int) -> SampleState:
        """Return one sample's state; its tokens are the file."""
        return self._states[index]

    def __iter__(self) -> Iterator[SampleState]:
        """Yield every sample's state."""
        return iter(self._states)

    def write(self, index: int, state: SampleState) -> None:
        """Replace a sample's tokens by those that a block made of them."""
        mapped = self._states[index]
        _file_of(mapped).copy_(tokens(state))
        if state.txt is None:
            self._states[index] = replace(mapped, img=_file_of(mapped), txt=None)


def _mapped(state: SampleState, path: Path) -> SampleState:
    values = tokens(state).cpu().contiguous()
    data = values.view(-1).view(torch.uint8).numpy().data
    # written first: a mapped file that grows on a full disk would end the process
    with storing(path, len(data)):
        path.write_bytes(data)
    flat = torch.from_file(str(path), shared=True, size=values.numel(), dtype=values.dtype)
    mapped = flat.view(values.shape)
    if state.txt is None:
        return replace(state, img=mapped)
    txt, img = mapped.split((state.txt.shape[1], state.img.shape[1]), dim=1)
    return replace(state, img=img, txt=txt)


def _file_of(state: SampleState) -> Tensor:
    """Return all of a mapped state's tokens ``[1, T + N, D]`` as one view of its file."""
    if state.txt is None:
        return state.img
    # both are slices of one tensor, which begins where the text does
    length = state.txt.shape[1] + state.img.shape[1]
    shape = (1, length, state.txt.shape[2])
    strides = (length * shape[2], shape[2], 1)
    return torch.as_strided(state.txt, shape, strides, state.txt.storage_offset())


def batches(
    states: StateFiles | Sequence[SampleState], indices: Sequence[int], batch_tokens: int
) -> list[list[int]]:
    """Group neighbours that can run through a block together.

    Args:
        states: Of all samples.
        indices: Those to group, in order.
        batch_tokens: A group takes no sample more once it has this many tokens.

    Returns:
        Groups of samples with equal shapes.
    """
    groups: list[list[int]] = []
    for index in indices:
        group = groups[-1] if groups else []
        if group and _fits(states[group[0]], states[index], len(group), batch_tokens):
            group.append(index)
        else:
            groups.append([index])
    return groups


def batched(states: Sequence[SampleState]) -> SampleState:
    """Join samples of equal shapes along the batch."""
    first = states[0]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(state, name) for state in states])

    return SampleState(
        img=joined("img"),
        txt=None if first.txt is None else joined("txt"),
        vec=joined("vec"),
        cos=joined("cos"),
        sin=joined("sin"),
        shared_mods=None if first.shared_mods is None else joined("shared_mods"),
    )


def _fits(first: SampleState, other: SampleState, count: int, batch_tokens: int) -> bool:
    text = [0 if state.txt is None else state.txt.shape[1] for state in (first, other)]
    same = first.img.shape == other.img.shape and text[0] == text[1]
    return same and count * (text[0] + first.img.shape[1]) < batch_tokens
