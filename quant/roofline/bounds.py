"""The least time and memory that a step can take on a GPU, part by part, and what would lower it.

Roofline (Williams, Waterman, Patterson 2009, doi:10.1145/1498765.1498785): a kernel takes at least
as long as its operations at the tensor cores' peak, and as its bytes at the memory's. Kernels run
one after the other. What the second-level cache saves is not counted, so passes over small pictures
can be faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..durations import block_kind
from ..errors.speed import FormatNotInGpuError
from ..flux.config import FluxConfig
from ..needs import PLAN_OVERHEAD
from ..recipe import Format
from .gpus import GpuPeaks
from .work import (
    MODULATION,
    Kernel,
    StepOptions,
    StepSizes,
    activation_bytes,
    end_bytes,
    lora_bytes,
    modulation_bytes,
    passing_bytes,
    step_kernels,
    stream_bytes,
    weight_bytes,
)

COMPUTE, MEMORY, BUS = "tensor cores", "memory", "bus"
PLANS_TAKE_TURNS = "plans taking turns"


@dataclass(frozen=True)
class PartBound:
    """The least that a part of a step takes.

    Attributes:
        part: Such as ``work.LINEARS``, with the format where it multiplies.
        flops: Operations.
        bytes: Moved.
        seconds: At least.
        cause: Where most of that time comes from: ``COMPUTE``, ``MEMORY`` or ``BUS``.
    """

    part: str
    flops: float
    bytes: float
    seconds: float
    cause: str


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on the GPU while sampling.

    Attributes:
        plans: All weights in plans.
        outside: Weights in PyTorch, and room for the largest modulation Linear on its way.
        activations: Of one block, and the token streams.
        lora: Factors of LoRAs at run time.
    """

    plans: float
    outside: float
    activations: float
    lora: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.plans + self.outside + self.activations + self.lora


@dataclass(frozen=True)
class Saving:
    """What a choice of the user would save.

    Attributes:
        choice: What to do, in words.
        seconds: Per step, of the bound.
    """

    choice: str
    seconds: float


@dataclass(frozen=True)
class StepBound:
    """The bound of one step.

    Attributes:
        gpu: Of which GPU.
        parts: Largest first.
        memory: What must be on the GPU.
        savings: Choices that would lower it, best first.
    """

    gpu: GpuPeaks
    parts: tuple[PartBound, ...]
    memory: MemoryNeed
    savings: tuple[Saving, ...]

    @property
    def seconds(self) -> float:
        """The least time of a step."""
        return sum(part.seconds for part in self.parts)


def step_bound(
    config: FluxConfig, sizes: StepSizes, options: StepOptions, gpu: GpuPeaks, steps: int
) -> StepBound:
    """Compute the bound of a step.

    Args:
        config: Of the model.
        sizes: Of pictures and prompt.
        options: Formats and additions.
        gpu: Where it runs.
        steps: Of a prompt, over which modulation weights that visit the GPU once are spread.

    Raises:
        FormatNotInGpuError: The GPU does not multiply a format.
    """
    bound = _bound(config, sizes, options, gpu, steps)
    savings = [
        Saving(choice, bound.seconds - _bound(config, sizes, other, gpu, steps).seconds)
        for choice, other in _choices(config, options, gpu)
    ]
    worthwhile = [saving for saving in savings if saving.seconds > 0.01 * bound.seconds]
    worthwhile.sort(key=lambda saving: -saving.seconds)
    return replace(bound, savings=tuple(worthwhile))


def block_bounds(
    config: FluxConfig, sizes: StepSizes, options: StepOptions, gpu: GpuPeaks
) -> dict[str, float]:
    """Return the least seconds of a block by kind, ``double`` and ``single``: of the slowest one.

    Raises:
        FormatNotInGpuError: As ``step_bound``.
    """
    seconds: dict[str, float] = {}
    for kernel in step_kernels(config, sizes, options):
        if kernel.block:
            taken = kernel_seconds(kernel, gpu)
            seconds[kernel.block] = seconds.get(kernel.block, 0.0) + taken
    kinds: dict[str, float] = {}
    for block, taken in seconds.items():
        kind = block_kind(block)
        kinds[kind] = max(taken, kinds.get(kind, 0.0))
    return kinds


def kernel_seconds(kernel: Kernel, gpu: GpuPeaks) -> float:
    """Return the least time of a kernel.

    Raises:
        FormatNotInGpuError: The GPU does not multiply its format.
    """
    return max(_compute_seconds(kernel, gpu), kernel.bytes / gpu.bandwidth)


def _compute_seconds(kernel: Kernel, gpu: GpuPeaks) -> float:
    if kernel.unit not in gpu.operations:
        usable = [unit.upper() for unit in gpu.operations]
        raise FormatNotInGpuError(gpu.name, kernel.unit, usable)
    return kernel.flops / gpu.operations[kernel.unit]


def _bound(
    config: FluxConfig, sizes: StepSizes, options: StepOptions, gpu: GpuPeaks, steps: int
) -> StepBound:
    groups: dict[str, list[Kernel]] = {}
    for kernel in step_kernels(config, sizes, options):
        label = f"{kernel.part}, {kernel.unit.upper()}" if kernel.flops else kernel.part
        groups.setdefault(label, []).append(kernel)
    memory = memory_need(config, sizes, options)
    parts = [_part(label, kernels, gpu) for label, kernels in groups.items()]
    parts += _over_the_bus(config, options, gpu, memory, steps)
    parts.sort(key=lambda part: -part.seconds)
    return StepBound(gpu, tuple(parts), memory, ())


def _part(label: str, kernels: Sequence[Kernel], gpu: GpuPeaks) -> PartBound:
    seconds = [kernel_seconds(kernel, gpu) for kernel in kernels]
    bound_by_compute = sum(
        taken
        for kernel, taken in zip(kernels, seconds, strict=True)
        if kernel.flops and _compute_seconds(kernel, gpu) == taken
    )
    return PartBound(
        label,
        sum(kernel.flops for kernel in kernels),
        sum(kernel.bytes for kernel in kernels),
        sum(seconds),
        COMPUTE if bound_by_compute > sum(seconds) / 2 else MEMORY,
    )


def memory_need(config: FluxConfig, sizes: StepSizes, options: StepOptions) -> MemoryNeed:
    """Return what is on the GPU while sampling; driver and compiled kernels come on top."""
    modulation = (
        modulation_bytes(config, options.modulation)
        if _stays(config, options)
        else passing_bytes(config)
    )
    return MemoryNeed(
        plans=PLAN_OVERHEAD * weight_bytes(config, options),
        outside=end_bytes(config) + modulation,
        activations=activation_bytes(config, sizes, options) + stream_bytes(config, sizes),
        lora=lora_bytes(config, options.lora_rank),
    )


def _stays(config: FluxConfig, options: StepOptions) -> bool:
    """Tell whether modulation weights stay on the GPU: all blocks of FLUX.2 share a few."""
    return options.modulation_per_step or config.shared_modulation


def _over_the_bus(
    config: FluxConfig, options: StepOptions, gpu: GpuPeaks, memory: MemoryNeed, steps: int
) -> Iterator[PartBound]:
    """What comes from main memory: modulation once per prompt, and plans that do not fit."""
    if not _stays(config, options):
        moved = modulation_bytes(config, options.modulation) / steps
        yield PartBound(f"{MODULATION}, once per prompt", 0.0, moved, moved / gpu.bus, BUS)
    missing = min(memory.plans, memory.total - gpu.memory)
    if missing > 0:
        yield PartBound(PLANS_TAKE_TURNS, 0.0, missing, missing / gpu.bus, BUS)


def _choices(
    config: FluxConfig, options: StepOptions, gpu: GpuPeaks
) -> Iterator[tuple[str, StepOptions]]:
    """Yield what a user could choose instead, in words of the nodes."""
    if not options.fp8_attention and "fp8" in gpu.operations:
        yield "FP8 attention in 'Quantize FLUX to FP4'", replace(options, fp8_attention=True)
    if options.lora_rank:
        yield "'lora: baked' in 'Load FLUX FP4 Engine'", replace(options, lora_rank=0)
    if options.branch_rank:
        yield (
            "a recipe without a low-rank branch, such as nvfp4-qat",
            replace(options, branch_rank=0),
        )
    if "nvfp4" in gpu.operations and set(options.formats.values()) != {"nvfp4"}:
        formats: dict[str, Format] = dict.fromkeys(options.formats, "nvfp4")
        yield "a recipe with every Linear in NVFP4", replace(options, formats=formats)
    if not _stays(config, options) and options.modulation == "bf16":
        yield "'modulation: nvfp4' in 'Quantize FLUX to FP4'", replace(options, modulation="nvfp4")
