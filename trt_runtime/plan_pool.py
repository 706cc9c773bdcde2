"""Which plans are on the GPU: all of them, or as many as a limit allows and one more in turn.

A sampler runs all blocks in the same order in every step, so keeping the least recently used would
keep nothing in time. Instead the first blocks that fit stay, and the others take turns in a place
that is reserved for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from .manifest import PlanEntry
from .plan_context import PlanContext

Open = Callable[[PlanEntry], PlanContext]


class PlanPool:
    """The contexts of an engine's blocks.

    Args:
        open_plan: Loads a plan.
        wait: Returns when the GPU runs none of the pool's plans any more.
    """

    def __init__(self, open_plan: Open, wait: Callable[[], None]) -> None:
        self._open, self._wait = open_plan, wait
        self._entries: dict[str, PlanEntry] = {}
        self._contexts: dict[str, PlanContext] = {}
        self._staying: frozenset[str] = frozenset()
        self._guest: str | None = None

    def set_plans(self, entries: Mapping[str, PlanEntry], limit: int | None) -> None:
        """Decide what stays; nothing is loaded or freed yet.

        Args:
            entries: Each block, in the order they run, with the plan it shall run.
            limit: GPU memory in bytes, None for no limit. The largest plan always fits.
        """
        self._entries = dict(entries)
        self._staying = staying_blocks({b: e.bytes for b, e in self._entries.items()}, limit)

    def settle(self) -> list[str]:
        """Free what shall not stay, load what shall and is missing; return the blocks loaded."""
        outdated = [
            block
            for block, context in self._contexts.items()
            if block not in self._staying or context.entry.key != self._entries[block].key
        ]
        if outdated:
            self._wait()
        for block in outdated:
            self._drop(block)
        loaded = [
            block
            for block in self._entries
            if block in self._staying and block not in self._contexts
        ]
        for block in loaded:
            self._contexts[block] = self._open(self._entries[block])
        return loaded

    def present(self, block: str) -> PlanContext | None:
        """Return a block's context if it is loaded."""
        return self._contexts.get(block)

    def take_turn(self, block: str) -> PlanContext | None:
        """Load a block into the place that others had before; None: there is no such block."""
        if block not in self._entries:
            return None
        if self._guest is not None:
            self._wait()
            self._drop(self._guest)
        self._contexts[block] = self._open(self._entries[block])
        self._guest = block
        return self._contexts[block]

    def contexts(self) -> Iterator[tuple[str, PlanContext]]:
        """Yield what is loaded."""
        yield from self._contexts.items()

    def release(self) -> None:
        """Free every context."""
        for block in list(self._contexts):
            self._drop(block)
        self._entries, self._staying = {}, frozenset()

    def _drop(self, block: str) -> None:
        self._contexts.pop(block).release()
        if block == self._guest:
            self._guest = None


def bytes_within(sizes: Mapping[str, int], limit: int | None) -> int:
    """Return what the pool takes under a limit, the place for the others included.

    Args:
        sizes: Bytes of each block's plan, in the order they run.
        limit: Bytes, None for no limit.
    """
    staying = staying_blocks(sizes, limit)
    place = 0 if len(staying) == len(sizes) else max(sizes.values())
    return sum(sizes[block] for block in staying) + place


def staying_blocks(sizes: Mapping[str, int], limit: int | None) -> frozenset[str]:
    """Return the blocks that stay on the GPU.

    Args:
        sizes: Bytes of each block's plan, in the order they run.
        limit: Bytes, None for no limit.
    """
    if limit is None or sum(sizes.values()) <= limit:
        return frozenset(sizes)
    left = limit - max(sizes.values(), default=0)
    staying = set()
    for block, size in sizes.items():
        if size <= left:
            staying.add(block)
            left -= size
    return frozenset(staying)
