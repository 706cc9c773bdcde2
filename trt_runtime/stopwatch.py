"""Marks in the order of work on a device, and the seconds between them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch


class Stopwatch(Protocol):
    """Takes marks without waiting for the device, so that the host runs ahead as in a sampler."""

    def mark(self) -> Any:
        """Return a mark behind all work that was given to the device so far."""

    def between(self, marks: Sequence[Any]) -> list[float]:
        """Wait for the last mark; return the seconds from each mark to the next."""


class HostStopwatch:
    """For devices that have finished when a call returns."""

    def mark(self) -> float:
        """Return the time now."""
        return time.perf_counter()

    def between(self, marks: Sequence[float]) -> list[float]:
        """Return the seconds from each mark to the next."""
        return [end - start for start, end in pairwise(marks)]


class CudaStopwatch:
    """Events on torch's current stream, which waits for the engine's.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """Return an event that was just enqueued."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """Wait for the last event; return the seconds from each one to the next."""
        marks[-1].synchronize()
        # torch tells milliseconds
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(marks)]


def stopwatch_for(device: torch.device) -> Stopwatch:
    """Return what measures work on a device."""
    return CudaStopwatch(device) if device.type == "cuda" else HostStopwatch()
