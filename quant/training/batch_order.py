"""Which samples each step learns from: a function of seed and step alone, so it needs no state."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch


class BatchOrder:
    """Batches of samples with equal shapes; in an epoch every sample comes at least once."""

    def __init__(self, shapes: Mapping[int, Hashable], batch: int, seed: int) -> None:
        """Group the samples.

        Args:
            shapes: By number of the sample.
            batch: Samples in each batch.
            seed: Of the order.
        """
        groups: dict[Hashable, list[int]] = {}
        for index, shape in shapes.items():
            groups.setdefault(shape, []).append(index)
        self._groups = list(groups.values())
        self._batch, self._seed = batch, seed
        self._epoch_batches = sum(-(-len(group) // batch) for group in self._groups)
        self._epoch, self._batches = -1, list[list[int]]()

    def batch(self, step: int) -> list[int]:
        """Return the samples of a step, counted from zero."""
        epoch, place = divmod(step, self._epoch_batches)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self._seed + epoch) % 2**63)
        batches = []
        for group in self._groups:
            order = torch.randperm(len(group), generator=generator).tolist()
            for start in range(0, len(group), self._batch):
                # the last batch is filled up from the first
                rows = [order[row % len(group)] for row in range(start, start + self._batch)]
                batches.append([group[row] for row in rows])
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def padded_batches(
    indices: Sequence[int], shapes: Sequence[Hashable], batch: int
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield every sample once, in batches of equal shapes and equal size.

    Args:
        indices: Of the samples.
        shapes: By index.
        batch: Samples in each batch.

    Yields:
        Indices, and whether each counts: samples that only fill up do not.
    """
    groups: dict[Hashable, list[int]] = {}
    for index in indices:
        groups.setdefault(shapes[index], []).append(index)
    for group in groups.values():
        for start in range(0, len(group), batch):
            chosen = group[start : start + batch]
            filling = batch - len(chosen)
            yield chosen + [chosen[0]] * filling, [True] * len(chosen) + [False] * filling
