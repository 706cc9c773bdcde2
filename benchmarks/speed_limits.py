"""The least time of a step by GPU, recipe and model: the tables of docs/performance.md.

    python benchmarks/speed_limits.py

Nothing is measured: it is reckoned from sizes and the data file of GPUs, as `bench --explain` does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from pack_import import register_pack  # noqa: E402

register_pack()

from flux_fp4.quant.errors.speed import FormatNotInGpuError  # noqa: E402
from flux_fp4.quant.quality.tables import markdown_table  # noqa: E402
from flux_fp4.quant.recipe import QuantizeOptions, named_recipe  # noqa: E402
from flux_fp4.quant.roofline.bounds import StepBound, step_bound  # noqa: E402
from flux_fp4.quant.roofline.gpus import known_gpus  # noqa: E402
from flux_fp4.quant.roofline.published import PUBLISHED  # noqa: E402
from flux_fp4.quant.roofline.report import milliseconds  # noqa: E402
from flux_fp4.quant.roofline.subjects import published_subject  # noqa: E402
from flux_fp4.quant.roofline.work import StepSizes  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
MEGAPIXEL = StepSizes(1, 4096, 512)
STEPS = 20
RECIPES = ("nvfp4-max", "nvfp4-svdquant-r32", "nvfp4-fp8mix", "fp8", "bf16")
GPU = "GeForce RTX 5090"


def least(
    gpu: str, model: str = "flux1-dev", recipe: str = "nvfp4-max", fp8_attention: bool = True
) -> StepBound:
    """Return the bound of a step of one picture of 1,024 x 1,024 pixels."""
    options = QuantizeOptions(recipe=named_recipe(recipe), fp8_attention=fp8_attention)
    subject = published_subject(model, options).running()
    return step_bound(subject.config, MEGAPIXEL, subject.options, known_gpus()[gpu], STEPS)


def by_gpu() -> Iterator[Sequence[str]]:
    """Yield rows: FLUX.1-dev on every GPU, in NVFP4, FP8 and bf16."""
    for name, gpu in known_gpus().items():
        cells = [_time(name, recipe, recipe != "bf16") for recipe in ("nvfp4-max", "fp8", "bf16")]
        yield name, f"{gpu.memory / 2**30:.0f} GiB", *cells


def by_recipe() -> Iterator[Sequence[str]]:
    """Yield rows: what recipe and attention change on one GPU."""
    for recipe in RECIPES:
        yield recipe, *(_time(GPU, recipe, fp8_attention) for fp8_attention in (True, False))


def by_model() -> Iterator[Sequence[str]]:
    """Yield rows: every published model on one GPU."""
    for model in PUBLISHED:
        bound = least(GPU, model)
        parts = {part.part.partition(",")[0]: part for part in bound.parts}
        shares = [f"{parts[p].seconds / bound.seconds:.0%}" for p in ("Linears", "attention")]
        flops = sum(part.flops for part in bound.parts) / 1e12
        memory = f"{bound.memory.total / 2**30:.1f} GiB"
        yield model, f"{flops:.0f}", milliseconds(bound.seconds), *shares, memory


def _time(gpu: str, recipe: str, fp8_attention: bool) -> str:
    try:
        bound = least(gpu, recipe=recipe, fp8_attention=fp8_attention)
    except FormatNotInGpuError:
        return "no tensor cores"
    turns = any(part.part == "plans taking turns" for part in bound.parts)
    return milliseconds(bound.seconds) + (" (does not fit)" if turns else "")


TABLES = {
    "limits by GPU": (("GPU", "memory", "nvfp4-max", "fp8", "bf16"), by_gpu),
    "limits by recipe": (("recipe", "attention in FP8", "in bf16"), by_recipe),
    "limits by model": (
        ("model", "TFLOP", "at least", "Linears", "attention", "on the GPU"),
        by_model,
    ),
}
"""By the name of the marks in the page."""


def page_with_tables(text: str) -> str:
    """Return the page with the tables between their marks."""
    for name, (header, rows) in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(start)
        after = rest.split(end)[1]
        text = f"{before}{start}{markdown_table(header, list(rows()))}\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
