"""Kinds of work that a build consists of, and estimates from runs of a kind of work."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .run_history import Run
from .spec import BuildSpec

START = "start of the build processes"
"""What a build takes besides its blocks: processes, the library, digests. Its units are builds."""

SAME_SIZE = 1.25
"""Runs whose units differ by less than this factor are of blocks of the same size."""

MACHINE_FACTOR = 1.3
"""By how much the same work differs between runs on a machine that does little else; an estimate
is never narrower. Two rounds of the same builds differed by 1.2 (docs/benchmarks.md)."""

OTHER_SIZE_FACTOR = 1.5
"""On top of it where only blocks of other sizes have run: time does not quite grow with units."""

FIXED_BYTES = {"double": 120e6, "single": 60e6}
"""Weights that take as long to build in as all else of a plan, on TensorRT-RTX 1.7: plans of
FLUX.1's width took 1.9 to 2.4 times as long as those of a twelfth of it (docs/benchmarks.md)."""


@dataclass(frozen=True)
class Estimate:
    """Seconds, as a range."""

    low: float
    high: float

    def __add__(self, other: Estimate) -> Estimate:
        """Return the range of both, one after the other."""
        return Estimate(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Estimate:
        """Return the range of so many equal pieces of work."""
        return Estimate(factor * self.low, factor * self.high)

    def __str__(self) -> str:
        if self.high < 90:
            return f"about {self.low:.0f} to {max(1, round(self.high))} s"
        if self.high < 90 * 60:
            return f"about {self.low / 60:.0f} to {self.high / 60:.0f} min"
        return f"about {self.low / 3600:.1f} to {self.high / 3600:.1f} h"


def total(estimates: Iterable[Estimate]) -> Estimate:
    """Return the range of pieces of work one after the other."""
    return sum(estimates, Estimate(0, 0))


def estimate(runs: Sequence[Run], units: float) -> Estimate | None:
    """Estimate a piece of work by runs of its kind.

    Args:
        runs: What ``RunHistory.runs`` returns.
        units: Of the piece of work.

    Returns:
        Between the quartiles of seconds per unit, and no narrower than ``MACHINE_FACTOR`` around
        their median; None without runs.
    """
    if not runs:
        return None
    same = [run for run in runs if 1 / SAME_SIZE < run.units / units < SAME_SIZE]
    factor = MACHINE_FACTOR * (1 if same else OTHER_SIZE_FACTOR)
    seconds = [run.seconds / run.units * units for run in same or runs]
    if len(seconds) == 1:
        return Estimate(seconds[0] / factor, seconds[0] * factor)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Estimate(min(low, median / factor), max(high, median * factor))


def estimate_plan(runs: Sequence[Run], block: str, weight_bytes: float) -> Estimate | None:
    """Estimate the build of a plan; as ``estimate``, but other sizes count by `FIXED_BYTES`."""
    fixed = FIXED_BYTES[block.split("_", 1)[0]]
    same = [run for run in runs if 1 / SAME_SIZE < run.units / weight_bytes < SAME_SIZE]
    if same:
        return estimate(same, weight_bytes)
    shifted = [Run(run.units + fixed, run.seconds) for run in runs]
    return estimate(shifted, weight_bytes + fixed)


def build_work(
    block: str, has_fp4: bool, has_fp8: bool, fp8_attention: bool, spec: BuildSpec
) -> str:
    """Name the work of building a block's plan; its units are bytes of weights.

    Args:
        block: Its name.
        has_fp4: Whether there are NVFP4 Linears.
        has_fp8: Whether there are FP8 Linears.
        fp8_attention: Whether attention is in FP8.
        spec: What it is built for.
    """
    formats = [name for name, has in (("nvfp4", has_fp4), ("fp8", has_fp8)) if has] or ["bf16"]
    attention = "fp8" if fp8_attention else "bf16"
    kind = block.split("_", 1)[0]
    return (
        f"build {kind}, {'+'.join(formats)}, {attention} attention, {spec.backend}, "
        f"{'+'.join(spec.targets)}"
    )
