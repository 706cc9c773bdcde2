"""The progress callback that every long step takes."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (phase text, done, total). It may raise to cancel; the step then cleans up."""

Record = Callable[[str, float, float], None]
"""Called with (kind of work, units, seconds): how long a piece of work took."""


def unrecorded(work: str, units: float, seconds: float) -> None:
    """Forget how long a piece of work took."""
