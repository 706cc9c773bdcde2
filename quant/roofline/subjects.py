"""What a bound is asked of: a published model with a recipe, or a quantized checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..checkpoint_layout import recipe_formats
from ..errors.recipes import RecipeError
from ..flux.config import FluxConfig
from ..quantized_checkpoint import QuantizedMetadata
from ..recipe import Format, QuantizeOptions
from .published import PUBLISHED
from .work import StepOptions


@dataclass(frozen=True)
class Subject:
    """A model as it would run.

    Attributes:
        name: Model and recipe, as texts show them.
        config: Its sizes.
        options: Its formats.
    """

    name: str
    config: FluxConfig
    options: StepOptions

    def running(self, lora_rank: int = 0, modulation_on_gpu: bool = False) -> Subject:
        """Return it with choices that are made on loading.

        Args:
            lora_rank: Of all LoRAs at run time together.
            modulation_on_gpu: Whether modulation weights stay on the GPU.
        """
        per_step = modulation_on_gpu or self.config.shared_modulation
        options = replace(self.options, lora_rank=lora_rank, modulation_per_step=per_step)
        return replace(self, options=options)


def published_subject(model: str, options: QuantizeOptions) -> Subject:
    """Return a published model with a recipe.

    Args:
        model: One of ``PUBLISHED``.
        options: The recipe and what else is chosen on quantizing.

    Raises:
        RecipeError: What ``auto`` chooses is known of quantized checkpoints only.
    """
    if options.recipe.auto is not None:
        raise RecipeError(
            options.recipe.name,
            "it measures a checkpoint to choose formats; ask for a checkpoint that it has made",
        )
    config = PUBLISHED[model]
    formats = recipe_formats(config, options)
    return Subject(f"{model}, {_described(options)}", config, _options(formats, options))


def checkpoint_subject(name: str, metadata: QuantizedMetadata) -> Subject:
    """Return a quantized checkpoint.

    Args:
        name: Of the checkpoint.
        metadata: Its header.
    """
    formats = recipe_formats(metadata.config, metadata.options)
    # `auto` has decided, Linear by Linear
    formats |= {linear.name: linear.format for linear in metadata.linears}
    described = f"{name} ({metadata.variant}, {_described(metadata.options)})"
    return Subject(described, metadata.config, _options(formats, metadata.options))


def _options(formats: dict[str, Format], options: QuantizeOptions) -> StepOptions:
    branch = options.recipe.low_rank
    return StepOptions(
        formats=formats,
        fp8_attention=options.fp8_attention,
        modulation=options.modulation,
        branch_rank=branch.rank if branch else 0,
    )


def _described(options: QuantizeOptions) -> str:
    attention = "FP8" if options.fp8_attention else "bf16"
    return f"{options.recipe.name}, attention in {attention}"
