"""How long a stage takes: what is left, from how long its last steps took, and what it took."""

from __future__ import annotations

from collections import deque

PATIENCE_S = 10.0
"""Shorter work says nothing of the time that is left."""

RECENT = 8
"""Steps that decide. Blocks that are found finished pass at once and say nothing of the others."""


class Remaining:
    """Estimates what is left of a row of equal steps; a row that begins anew is another one."""

    def __init__(self) -> None:
        self._total, self._done = 0, 0
        self._ends: deque[float] = deque(maxlen=RECENT + 1)
        self._began = 0.0

    def seconds(self, now: float, done: int, total: int) -> float | None:
        """Return the seconds that are left, or None as long as that is a guess.

        Args:
            now: Seconds on a clock that never goes back.
            done: Finished steps.
            total: Of all.
        """
        if total != self._total or done < self._done:
            self._total, self._done, self._began = total, done, now
            self._ends = deque([now], maxlen=RECENT + 1)
        elif done > self._done:
            # of several steps at once each took its part of the time
            step = (now - self._ends[-1]) / (done - self._done)
            last = self._ends[-1]
            self._ends.extend(last + step * n for n in range(1, done - self._done + 1))
            self._done = done
        if now - self._began < PATIENCE_S or len(self._ends) < 2:
            return None
        pace = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return max(0.0, pace * (total - done) - (now - self._ends[-1]))


def remaining_text(seconds: float) -> str:
    """Say how long that is, in the unit that people would use."""
    if seconds < 60:
        return "less than a minute left of this part"
    minutes = seconds / 60
    if minutes < 90:
        return f"about {minutes:.0f} min left of this part"
    return f"about {minutes / 60:.1f} h left of this part"


def duration_text(seconds: float) -> str:
    """Say how long something took."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
