"""Size of a quantized FLUX.1-dev by recipe, from shapes alone.

    python benchmarks/recipe_sizes.py

Recipe ``auto`` is missing: it decides by the weights.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from full_size import FLUX1_DEV  # noqa: E402
from pack_import import register_pack  # noqa: E402

register_pack()

from flux_fp4.quant.checkpoint_layout import (  # noqa: E402
    Layout,
    checkpoint_layout,
    recipe_formats,
)
from flux_fp4.quant.flux.config import FluxConfig  # noqa: E402
from flux_fp4.quant.flux.model import tensor_shapes  # noqa: E402
from flux_fp4.quant.quantized_checkpoint import is_in_plan  # noqa: E402
from flux_fp4.quant.recipe import RECIPES, QuantizeOptions, named_recipe  # noqa: E402


@dataclass(frozen=True)
class Shapes:
    """What a layout needs of a source of weights."""

    config: FluxConfig
    shapes: dict[str, tuple[int, ...]]

    def dtype(self, name: str) -> torch.dtype:
        """Return what every tensor is stored in."""
        return torch.bfloat16


def layout_of(recipe: str, modulation: str = "bf16") -> Layout:
    options = QuantizeOptions(recipe=named_recipe(recipe), modulation=modulation)
    source = Shapes(FLUX1_DEV, tensor_shapes(FLUX1_DEV))
    return checkpoint_layout(source, recipe_formats(FLUX1_DEV, options), options)


def gigabytes(layout: Layout, *, in_plans: bool) -> float:
    return (
        sum(
            dtype.itemsize * torch.Size(shape).numel()
            for name, (dtype, shape) in layout.items()
            if is_in_plan(name) == in_plans
        )
        / 1e9
    )


def main() -> None:
    print("| recipe | in the engine, GB | in PyTorch, GB |\n|---|---|---|")
    for recipe in (name for name in RECIPES if name != "auto"):
        layout = layout_of(recipe)
        inside, outside = (gigabytes(layout, in_plans=where) for where in (True, False))
        print(f"| {recipe} | {inside:.1f} | {outside:.1f} |")
    for modulation in ("fp8", "nvfp4"):
        outside = gigabytes(layout_of("nvfp4-max", modulation), in_plans=False)
        print(f"| any, modulation in {modulation} | | {outside:.1f} |")


if __name__ == "__main__":
    main()
