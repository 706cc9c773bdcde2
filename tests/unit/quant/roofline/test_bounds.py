"""Bounds of a step on a GPU, and what would lower them."""

from __future__ import annotations

from typing import Any

import pytest
from flux_fp4.quant.checkpoint_layout import recipe_formats
from flux_fp4.quant.errors.speed import FormatNotInGpuError
from flux_fp4.quant.recipe import QuantizeOptions, named_recipe
from flux_fp4.quant.roofline.bounds import (
    BUS,
    COMPUTE,
    MEMORY,
    PLANS_TAKE_TURNS,
    StepBound,
    block_bounds,
    kernel_seconds,
    step_bound,
)
from flux_fp4.quant.roofline.gpus import GpuPeaks, gpu_peaks
from flux_fp4.quant.roofline.published import PUBLISHED
from flux_fp4.quant.roofline.work import LINEARS, Kernel, StepOptions, StepSizes

MEGAPIXEL = StepSizes(1, 4096, 512)
GPU = GpuPeaks(
    "test", "sm120", {"nvfp4": 8e12, "fp8": 4e12, "bf16": 1e12}, 1e11, 64e9, 1e10, "here"
)


def bound(
    gpu: GpuPeaks = GPU,
    model: str = "flux1-dev",
    recipe: str = "nvfp4-max",
    sizes: StepSizes = MEGAPIXEL,
    steps: int = 20,
    **options: Any,
) -> StepBound:
    config = PUBLISHED[model]
    formats = recipe_formats(config, QuantizeOptions(recipe=named_recipe(recipe)))
    return step_bound(config, sizes, StepOptions(formats, **options), gpu, steps)


def part(found: StepBound, start: str) -> Any:
    return next(part for part in found.parts if part.part.startswith(start))


def choices(found: StepBound) -> list[str]:
    return [saving.choice for saving in found.savings]


def test_a_kernel_takes_the_longer_of_two() -> None:
    assert kernel_seconds(Kernel(LINEARS, "wide", "nvfp4", 16e12, 1e11), GPU) == 2
    assert kernel_seconds(Kernel(LINEARS, "thin", "nvfp4", 4e12, 1e11), GPU) == 1


def test_parts_make_the_step_and_say_what_bounds_them() -> None:
    found = bound()
    assert found.seconds == sum(each.seconds for each in found.parts)
    assert [each.seconds for each in found.parts] == sorted(
        (each.seconds for each in found.parts), reverse=True
    )
    assert part(found, "Linears, NVFP4").cause == COMPUTE
    assert part(found, "Linears").seconds == pytest.approx(59.5 / 8, rel=0.01)
    assert part(found, "norms").cause == MEMORY
    assert part(found, "modulation, once").cause == BUS
    # a picture of 64 pixels: weights are read for hardly anything
    small = bound(sizes=StepSizes(1, 4, 4))
    assert part(small, "Linears, NVFP4").cause == MEMORY


def test_blocks_make_the_step() -> None:
    config = PUBLISHED["flux1-dev"]
    formats = recipe_formats(config, QuantizeOptions())
    kinds = block_bounds(config, MEGAPIXEL, StepOptions(formats), GPU)
    found = bound()
    outside = ("modulation", "embedders")
    blocks = sum(p.seconds for p in found.parts if not p.part.startswith(outside))
    assert 19 * kinds["double"] + 38 * kinds["single"] == pytest.approx(blocks)


def test_attention_in_bf16_is_named() -> None:
    found = bound(fp8_attention=False)
    assert choices(found)[0] == "FP8 attention in 'Quantize FLUX to FP4'"
    assert found.savings[0].seconds == pytest.approx(found.seconds - bound().seconds)
    assert "FP8 attention" not in " ".join(choices(bound()))


def test_branches_and_lora_are_named() -> None:
    found = bound(branch_rank=64, lora_rank=32)
    assert "'lora: baked' in 'Load FLUX FP4 Engine'" in choices(found)
    assert "a recipe without a low-rank branch, such as nvfp4-qat" in choices(found)
    assert part(found, "low-rank branches, BF16").seconds > part(found, "LoRA, BF16").seconds > 0


def test_wider_formats_are_named() -> None:
    assert "a recipe with every Linear in NVFP4" in choices(bound(recipe="fp8"))
    mixed = bound(recipe="nvfp4-fp8mix")
    assert part(mixed, "Linears, FP8").flops > 0
    assert part(mixed, "Linears, NVFP4").flops > 0


def test_a_gpu_without_a_format_is_refused() -> None:
    ada = gpu_peaks("GeForce RTX 4090")
    with pytest.raises(FormatNotInGpuError, match="RTX 4090 has no tensor cores for NVFP4"):
        bound(ada)
    assert "a recipe with every Linear in NVFP4" not in choices(bound(ada, recipe="fp8"))


def test_what_does_not_fit_comes_over_the_bus_in_every_step() -> None:
    fits, little = bound(), bound(GpuPeaks(**{**vars(GPU), "memory": 3e9}))
    assert PLANS_TAKE_TURNS not in {each.part for each in fits.parts}
    moved = part(little, PLANS_TAKE_TURNS)
    assert moved.bytes == pytest.approx(little.memory.total - 3e9)
    assert (moved.seconds, moved.cause) == (moved.bytes / 1e10, BUS)
    # activations alone are too much: all plans go by, and no more than that
    least = bound(GpuPeaks(**{**vars(GPU), "memory": 1e8}))
    assert part(least, PLANS_TAKE_TURNS).bytes == least.memory.plans


def test_memory_is_that_of_the_account() -> None:
    """docs/memory.md: 5.89 GB, plans as the builder reports them."""
    found = bound(model="flux1-dev").memory
    assert found.total == pytest.approx(5_890_634_588, rel=0.01)
    assert bound(modulation_per_step=True).memory.total == pytest.approx(12_121_277_276, rel=0.01)


def test_modulation_is_spread_over_the_steps() -> None:
    assert part(bound(steps=40), "modulation").seconds == pytest.approx(
        part(bound(steps=20), "modulation").seconds / 2
    )
    assert part(bound(modulation_per_step=True), "modulation, BF16").cause == MEMORY


@pytest.mark.parametrize(
    ("gpu", "recipe", "pixels", "milliseconds", "options"),
    [
        # torchao with diffusers, 28 steps: PyTorch's blog, "Faster Diffusion on Blackwell", 2026
        ("B200", "bf16", (1024, 1024), 2100 / 28, {}),
        ("B200", "nvfp4-max", (1024, 1024), 1410 / 28, {}),
        # Nunchaku, 25 steps: github.com/nunchaku-tech/ComfyUI-nunchaku, issue 35
        ("GeForce RTX 5090", "nvfp4-svdquant-r32", (896, 1024), 4900 / 25, {"branch_rank": 32}),
    ],
)
def test_nobody_is_faster_than_the_bound(
    gpu: str,
    recipe: str,
    pixels: tuple[int, int],
    milliseconds: float,
    options: dict[str, Any],
) -> None:
    sizes = StepSizes(1, pixels[0] * pixels[1] // 256, 512)
    found = bound(
        gpu_peaks(gpu), recipe=recipe, sizes=sizes, fp8_attention=False,
        modulation_per_step=True, **options,
    )  # fmt: skip
    least = 1000 * found.seconds
    assert 0.2 * milliseconds < least < milliseconds, f"{least:.1f} ms of {milliseconds:.1f} ms"


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_published_model_has_a_bound(model: str) -> None:
    found = bound(gpu_peaks("GeForce RTX 5090"), model)
    assert 0.01 < found.seconds < 0.5
