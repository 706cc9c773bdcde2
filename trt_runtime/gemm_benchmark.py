"""Matrix products of a model's Linears in bf16, FP8 and NVFP4, as this machine's libraries do them.

What the tensor cores reach without an engine: the other side of a bound that is reckoned. bf16 and
FP8 are torch's products, NVFP4 those of comfy_kitchen, which comes with ComfyUI; each calls cuBLAS.
Inputs are rounded beforehand: in an engine that is a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from .benchmark import Spread
from .progress import Progress
from .stopwatch import stopwatch_for

Product = Callable[[], object]

E4M3_MAX, E2M1_MAX = 448.0, 6.0
"""Largest values of the types."""


@dataclass(frozen=True)
class Gemm:
    """A matrix product.

    Attributes:
        name: Of the Linear.
        tokens: Rows of its input.
        inputs: Channels of a token.
        outputs: Channels that it gives.
    """

    name: str
    tokens: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.tokens * self.inputs * self.outputs


@dataclass
class GemmTiming:
    """What was measured of a product.

    Attributes:
        gemm: The product.
        seconds: By format.
        missing: Why a format could not be measured.
    """

    gemm: Gemm
    seconds: dict[str, Spread] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def tflops(self, format: str) -> float:
        """Return the speed that a format reached, in 1e12 operations per second."""
        return self.gemm.flops / self.seconds[format].median / 1e12


def measure_gemms(
    gemms: Sequence[Gemm],
    device: torch.device,
    warm_up: int,
    repetitions: int,
    progress: Progress,
) -> list[GemmTiming]:
    """Measure products in every format, the formats in turns.

    Args:
        gemms: What to measure.
        device: Where.
        warm_up: Calls of each that do not count.
        repetitions: Calls that count.
        progress: Called before each product; may raise to cancel.
    """
    found = []
    for done, gemm in enumerate(gemms):
        progress(f"Multiplying {gemm.name}", done, len(gemms))
        found.append(_measure(gemm, device, warm_up, repetitions))
    return found


@torch.inference_mode()
def _measure(gemm: Gemm, device: torch.device, warm_up: int, repetitions: int) -> GemmTiming:
    timing = GemmTiming(gemm)
    x = torch.randn(gemm.tokens, gemm.inputs, device=device, dtype=torch.bfloat16)
    weight = torch.randn(gemm.outputs, gemm.inputs, device=device, dtype=torch.bfloat16)
    products: dict[str, Product] = {}
    for name, prepare in (("bf16", _bf16), ("fp8", _fp8), ("nvfp4", _nvfp4)):
        ready = _ready(partial(prepare, x, weight), warm_up)
        if isinstance(ready, str):
            timing.missing[name] = ready
        else:
            products[name] = ready
    watch = stopwatch_for(device)
    seconds: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(repetitions):
        marks = [watch.mark()]
        for product in products.values():
            product()
            marks.append(watch.mark())
        for name, each in zip(products, watch.between(marks), strict=True):
            seconds[name].append(each)
    timing.seconds = {name: Spread.of(each) for name, each in seconds.items()}
    return timing


def _ready(prepare: Callable[[], Product], warm_up: int) -> Product | str:
    """Return a product that has run, or why it cannot: there are many reasons.

    The GPU may not have these tensor cores, torch not these products, and comfy_kitchen may be
    missing.
    """
    try:
        product = prepare()
        for _ in range(warm_up):
            product()
    except torch.OutOfMemoryError:
        raise
    except (ImportError, RuntimeError, ValueError) as error:
        return str(error).splitlines()[0].split(". ")[0]
    return product


def _bf16(x: torch.Tensor, weight: torch.Tensor) -> Product:
    return lambda: torch.nn.functional.linear(x, weight)


def _fp8(x: torch.Tensor, weight: torch.Tensor) -> Product:
    """One scale per tensor; the second matrix is in column order, as cuBLAS wants it."""
    scales = [t.abs().amax().float() / E4M3_MAX for t in (x, weight)]
    a, b = (
        (t.float() / scale).to(torch.float8_e4m3fn)
        for t, scale in zip((x, weight), scales, strict=True)
    )
    return lambda: torch._scaled_mm(
        a, b.t(), scales[0], scales[1], out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _nvfp4(x: torch.Tensor, weight: torch.Tensor) -> Product:
    import comfy_kitchen

    scales = [t.abs().amax().float() / (E4M3_MAX * E2M1_MAX) for t in (x, weight)]
    (a, a_scales), (b, b_scales) = (
        comfy_kitchen.quantize_nvfp4(t, scale, pad_16x=True)
        for t, scale in zip((x, weight), scales, strict=True)
    )
    return lambda: comfy_kitchen.scaled_mm_nvfp4(
        a, b, scales[0], scales[1], a_scales, b_scales, out_dtype=torch.bfloat16
    )
