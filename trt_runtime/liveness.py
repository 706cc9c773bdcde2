"""Signs of life of a build process: CPU time and TensorRT's messages; and how much memory it took.

Looked at from outside, because a process whose native code holds Python's lock in a deadlock
could not say anything about itself.
"""

from __future__ import annotations

import time

import psutil

from .resources import Memory, free_memory

CHECK_SECONDS = 1.0

STALLED_SECONDS = 300.0
"""A process that uses no CPU time at all and says nothing for so long waits for what will not come.
Even a slow network disk costs CPU time with every read, and swapping slows a process down but does
not stop it."""

SILENT_SECONDS = 3600.0
"""TensorRT reports every layer and every kernel it tries: thousands of messages in the second that
TensorRT-RTX needs for a block. A process that computes for an hour without one runs in circles."""


class Liveness:
    """What is known of one process since its last job began."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.messages = 0
        """Counts TensorRT's messages; the thread that reads them raises it."""

        self.peak_bytes = 0
        self.least_free: Memory = free_memory()
        self._last = (0, 0.0)
        self.begin()

    def begin(self) -> None:
        """Start anew: a job begins."""
        self._stalled = self._silent = 0.0
        self._checked = time.monotonic()

    def hang(self) -> str:
        """Return why the process counts as hung, or nothing; call it often."""
        elapsed = time.monotonic() - self._checked
        if elapsed < CHECK_SECONDS:
            return ""
        self._checked += elapsed
        # what is longer is this process's own pause: a debugger, a computer that slept
        self._observe(min(elapsed, 2 * CHECK_SECONDS))
        if self._stalled >= STALLED_SECONDS:
            return f"hung, {self._stalled:.0f} s without CPU time or a message of TensorRT"
        if self._silent >= SILENT_SECONDS:
            return f"hung, {self._silent:.0f} s of computing without a message of TensorRT"
        return ""

    def _observe(self, elapsed: float) -> None:
        try:
            process = psutil.Process(self._pid)
            # Windows: a venv's python.exe is a launcher, the worker is its child
            family = [process, *process.children(recursive=True)]
            times = [member.cpu_times() for member in family]
            memory = sum(member.memory_info().rss for member in family)
        except psutil.Error:
            # it ended meanwhile, which its closed output tells
            return
        self.peak_bytes = max(self.peak_bytes, memory)
        self.least_free = min(self.least_free, free_memory())
        seen = (self.messages, sum(entry.user + entry.system for entry in times))
        self._silent = 0.0 if seen[0] != self._last[0] else self._silent + elapsed
        self._stalled = 0.0 if seen != self._last else self._stalled + elapsed
        self._last = seen
