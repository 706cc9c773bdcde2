"""What a stage spends its seconds on, for the log: users ask why loading takes long."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class PartTimes:
    """Seconds by part of one stage, in the order in which the parts came first."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the body, also of one that fails."""
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent

    @property
    def total(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._started

    def __str__(self) -> str:
        """All parts and what is left of the total, such as ``2.1 s (digests 2.0, rest 0.1)``."""
        total = self.total
        parts = {**self.seconds, "rest": max(0.0, total - sum(self.seconds.values()))}
        listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        return f"{total:.1f} s ({listed})"
