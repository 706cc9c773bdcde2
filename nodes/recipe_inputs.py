"""The inputs by which every quantizing node asks for a recipe, and what they mean."""

from __future__ import annotations

from comfy_api.latest import io

from ..quant.recipe import (
    RECIPES,
    Format,
    QuantizeOptions,
    named_recipe,
    quantize_options,
    read_recipe,
)
from . import paths
from .fingerprint import FileState, file_state


def recipe_input() -> io.Combo.Input:
    """Return the picker of recipes: those of the pack, then the user's own files."""
    own = [name for name in paths.user_recipes() if name not in RECIPES]
    lines = [f"{name}: {named_recipe(name).summary}" for name in RECIPES]
    lines.append("Your own: .yaml files in models/flux_fp4/recipes.")
    return io.Combo.Input(
        "recipe", options=[*RECIPES, *own], default=RECIPES[0], tooltip="\n".join(lines)
    )


FP8_ATTENTION = io.Boolean.Input(
    "fp8_attention",
    display_name="fp8 attention",
    default=True,
    tooltip="Run attention in FP8 as well (RTX 40 and newer). It is faster on every supported GPU; "
    "turn it off to compare image quality with bf16 attention.",
)

ADVANCED = [
    io.Combo.Input(
        "modulation",
        options=["bf16", "fp8", "nvfp4"],
        default="bf16",
        optional=True,
        advanced=True,
        tooltip="How modulation weights are kept, which stay in PyTorch: 3.2 of FLUX.1-dev's 11.9 "
        "billion. bf16 takes 6.5 GB of memory, fp8 3.2 GB, nvfp4 1.8 GB.",
    ),
    io.Float.Input(
        "percentile",
        default=100.0,
        min=90.0,
        max=100.0,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip="Share of tokens whose largest value must fit into an activation scale. 100 cuts "
        "nothing off that calibration saw.",
    ),
    io.Float.Input(
        "headroom",
        default=1.25,
        min=1.0,
        max=16.0,
        step=0.05,
        optional=True,
        advanced=True,
        tooltip="Room above what calibration saw, for pictures that reach further.",
    ),
    io.Float.Input(
        "quality_floor",
        display_name="auto: quality floor (dB)",
        default=0.0,
        min=0.0,
        max=60.0,
        step=0.5,
        optional=True,
        advanced=True,
        tooltip="Recipe auto: SQNR that what each block adds must reach. 0 takes the recipe's own.",
    ),
    io.Float.Input(
        "size_limit",
        display_name="auto: size limit (GiB)",
        default=0.0,
        min=0.0,
        max=64.0,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip="Recipe auto: largest size of all weights in plans; the best quality that fits is "
        "made. 0 is no limit.",
    ),
]


def options_from(
    recipe: str,
    fp8_attention: bool,
    modulation: Format = "bf16",
    percentile: float = 100.0,
    headroom: float = 1.25,
    quality_floor: float = 0.0,
    size_limit: float = 0.0,
) -> QuantizeOptions:
    """Return what the inputs ask for.

    Raises:
        RecipeError: The recipe's file is wrong, or a budget is set for a recipe that has none.
    """
    chosen = named_recipe(recipe) if recipe in RECIPES else read_recipe(paths.user_recipe(recipe))
    return quantize_options(
        chosen, fp8_attention, modulation, percentile, headroom, quality_floor, size_limit
    )


def recipe_state(recipe: str | None) -> FileState:
    """Return the state of a user's recipe file; None for the pack's own, which do not change."""
    # None as well while the recipe comes through a link
    if recipe is None or recipe in RECIPES:
        return None
    return file_state(paths.user_recipe(recipe))
