"""The progress callback that every long step takes."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (phase text, done, total). It may raise to cancel; the step then cleans up."""
