"""The recipes that a checkpoint can be quantized with. Imports nothing: node schemas list them."""

from __future__ import annotations

from dataclasses import dataclass

RECIPES = ("nvfp4-max",)
"""``nvfp4-max``: weights and activations in NVFP4, scales from the largest value seen."""


@dataclass(frozen=True)
class QuantizeOptions:
    """What the user chooses about quantization.

    Attributes:
        recipe: One of ``RECIPES``.
        fp8_attention: Calibrate q, k and v, so that plans run attention in FP8.
    """

    recipe: str = "nvfp4-max"
    fp8_attention: bool = True

    def __post_init__(self) -> None:
        """Reject a recipe that does not exist."""
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe '{self.recipe}' is none of {', '.join(RECIPES)}")
