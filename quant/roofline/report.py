"""The bound of a step in words."""

from __future__ import annotations

from ..quality.tables import text_table
from .bounds import MemoryNeed, PartBound, StepBound
from .work import StepSizes

GIB = 1 << 30
"""GPUs are sold by it."""

_HEADER = ("part", "TFLOP", "GB", "at least", "share", "bound by")


def bound_text(model: str, bound: StepBound, sizes: StepSizes, steps: int) -> str:
    """Describe a bound.

    Args:
        model: What it is of, such as ``flux1-dev, nvfp4-max``.
        bound: Of one step.
        sizes: What the step works on.
        steps: How many a picture takes.
    """
    seconds, gpu = bound.seconds, bound.gpu
    lines = [
        f"{model} on {gpu.name}: at least {milliseconds(seconds)} per step, "
        f"{steps * seconds:.1f} s for {steps} steps",
        f"{sizes.img_tokens} image and {sizes.txt_tokens} text tokens, batch {sizes.batch}",
        "",
        text_table(_HEADER, [_row(part, seconds) for part in bound.parts]),
        "",
        _memory_line(bound.memory, gpu.memory),
        *(f"{saving.choice}: saves {milliseconds(saving.seconds)}" for saving in bound.savings),
        f"Peaks: {gpu.source}",
    ]
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    """Return a time that is short."""
    return f"{1000 * seconds:.1f} ms"


def _row(part: PartBound, total: float) -> tuple[str, ...]:
    return (
        part.part,
        f"{part.flops / 1e12:.2f}" if part.flops else "",
        f"{part.bytes / 1e9:.2f}",
        milliseconds(part.seconds),
        f"{part.seconds / total:.0%}",
        part.cause,
    )


def _memory_line(need: MemoryNeed, memory: float) -> str:
    parts = {
        "plans": need.plans,
        "other weights": need.outside,
        "activations": need.activations,
        "LoRA": need.lora,
    }
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    fits = "" if need.total <= memory else "; it does not fit, so plans take turns in every step"
    return f"on the GPU: {need.total / GIB:.2f} GiB of {memory / GIB:.0f} ({listed}){fits}"
