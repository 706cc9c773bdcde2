"""How long stages report progress to whoever called them."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""``progress(phase, done, total)``. It may raise to cancel; stages clean up and let it through."""

Record = Callable[[str, float, float], None]
"""``record(kind of work, units, seconds)``: how long a piece of work took, see ``durations``."""


def unrecorded(work: str, units: float, seconds: float) -> None:
    """Forget how long a piece of work took."""
