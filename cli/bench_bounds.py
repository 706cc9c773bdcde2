"""How near measured blocks come to what the GPU could do, and what would bring the bound down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from ..quant.roofline.bounds import StepBound
    from ..quant.roofline.subjects import Subject
    from ..quant.roofline.work import StepSizes
    from ..trt_runtime.benchmark import EngineTiming


@dataclass(frozen=True)
class MeasuredBound:
    """The bound of an engine on the GPU that measured it.

    Attributes:
        step: Of everything in a step.
        kinds: Least seconds of one block by kind.
        clock_mhz: Of the multiprocessors, at the end of the measurement; None if it is unknown.
    """

    step: StepBound
    kinds: dict[str, float]
    clock_mhz: int | None

    def reached(self, timing: EngineTiming) -> dict[str, float]:
        """Return the bound in parts of the measured median, by kind; 1 is as fast as can be."""
        return {kind.kind: self.kinds[kind.kind] / kind.engine.median for kind in timing.kinds}

    def figures(self, timing: EngineTiming) -> dict[str, Any]:
        """Return everything for a file."""
        return {
            "gpu": self.step.gpu.name,
            "source": self.step.gpu.source,
            "clock_mhz": self.clock_mhz,
            "block_seconds": self.kinds,
            "reached": self.reached(timing),
            "savings": {saving.choice: saving.seconds for saving in self.step.savings},
        }

    def lines(self, timing: EngineTiming) -> Iterator[str]:
        """Yield what to print: how near each kind is, the furthest one, and what would help."""
        reached = self.reached(timing)
        for kind, part in reached.items():
            least = 1000 * self.kinds[kind]
            yield f"{kind} blocks: at least {least:.3f} ms each, {part:.0%} of that speed reached"
        furthest = min(reached, key=lambda kind: reached[kind])
        yield (
            f"furthest from the bound: {furthest} blocks. The bound counts one kernel per Linear, "
            "one for attention and one pass between two of them, at boost clock; "
            "docs/performance.md lists what plans have beyond that"
        )
        if self.clock_mhz:
            yield f"multiprocessors ran at {self.clock_mhz} MHz"
        for saving in self.step.savings:
            yield f"{saving.choice}: lowers the bound of a step by {1000 * saving.seconds:.1f} ms"


def measured_bound(
    subject: Subject, sizes: StepSizes, device: torch.device
) -> MeasuredBound | None:
    """Return the bound on a device; None on a CPU, and for a GPU whose peaks are not known."""
    from ..quant.errors.speed import FormatNotInGpuError, UnknownGpuError
    from ..quant.roofline.bounds import block_bounds, step_bound
    from ..quant.roofline.gpus import device_peaks

    if device.type != "cuda":
        return None
    try:
        gpu = device_peaks(device)
        step = step_bound(subject.config, sizes, subject.options, gpu, steps=20)
        kinds = block_bounds(subject.config, sizes, subject.options, gpu)
    except (UnknownGpuError, FormatNotInGpuError) as error:
        print(f"No bound is shown. {error}")
        return None
    return MeasuredBound(step, kinds, _clock_mhz(device))


def _clock_mhz(device: torch.device) -> int | None:
    import torch

    try:
        # asks NVML, whose Python package is not everywhere
        return int(torch.cuda.clock_rate(device))
    except (ImportError, RuntimeError):
        return None
