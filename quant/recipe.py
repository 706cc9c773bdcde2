"""Recipes: which format each Linear gets and how its scales are found. One YAML file each."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors.recipes import RecipeError

Format = Literal["nvfp4", "fp8", "bf16"]

RECIPES = (
    "nvfp4-max",
    "nvfp4-mse",
    "nvfp4-qat",
    "nvfp4-awq",
    "nvfp4-svdquant-r16",
    "nvfp4-svdquant-r32",
    "nvfp4-svdquant-r64",
    "nvfp4-svdquant-r128",
    "nvfp4-fp8mix",
    "auto",
    "fp8",
    "bf16",
)
"""The recipes that come with the pack, as a picker shows them: the default first, then better ones
at more cost, then other precisions."""

_FOLDER = Path(__file__).parent / "recipes"

_MAX_RECIPE_BYTES = 64 << 10
"""A recipe is a dozen lines; bounds what a hostile file costs the parser."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LowRankOptions(_Frozen):
    """SVDQuant's high-precision branch (Li et al. 2024, arXiv:2411.05007).

    Attributes:
        rank: Width of the branch.
        method: ``randomized`` range finder or ``full`` SVD.
        refinements: How often the branch is fitted again to what quantization left over.
    """

    rank: Literal[16, 32, 64, 128]
    method: Literal["randomized", "full"] = "randomized"
    refinements: int = Field(default=0, ge=0, le=16)


class FormatOverride(_Frozen):
    """Linears that get a format of their own.

    Attributes:
        linears: Shell patterns over full names such as ``double_blocks.0.img_mlp.2``.
        format: What they get.
    """

    linears: tuple[Annotated[str, Field(max_length=100)], ...] = Field(max_length=256)
    format: Format


class FormatBudget(_Frozen):
    """What ``auto`` may spend, or must reach; at least one of the two.

    Attributes:
        floor_db: Smallest allowed SQNR of what a block adds to its input, in dB.
        max_bytes: Largest allowed size of all weights in plans.
    """

    floor_db: float | None = Field(default=None, gt=0, le=100)
    max_bytes: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_a_goal(self) -> FormatBudget:
        if self.floor_db is None and self.max_bytes is None:
            raise ValueError("a budget needs floor_db or max_bytes")
        return self


class TrainingOptions(_Frozen):
    """Distilling each block from the original, after it was quantized.

    Attributes:
        steps: Optimizer steps per block.
        learning_rate: Of the values behind the codes; its unit is the step between codes, so one
            rate suits every Linear of every model.
        relative_learning_rate: Of block scales, biases and low-rank branch, in parts of their size.
    """

    steps: int = Field(default=200, ge=1, le=100_000)
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    relative_learning_rate: float = Field(default=1e-3, gt=0, le=1)


class Recipe(_Frozen):
    """How to quantize.

    Attributes:
        name: As shown and stored.
        summary: The trade-off in one line, for the user who chooses.
        linears: Format of every block Linear.
        overrides: Exceptions; the last match wins.
        scale_search: How NVFP4 block scales are chosen, see ``nvfp4.quantize_weight``.
        smoothing: ``awq`` moves outliers of the input into the weight, channel by channel.
        low_rank: The branch in high precision, if any.
        auto: If set, ``linears`` is where measured sensitivity starts from.
        training: If set, every block is trained after it was quantized, one after the other.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,49}$")
    summary: str = Field(min_length=1, max_length=200)
    linears: Format
    overrides: tuple[FormatOverride, ...] = Field(default=(), max_length=64)
    scale_search: Literal["max", "mse", "four-over-six"] = "max"
    smoothing: Literal["none", "awq"] = "none"
    low_rank: LowRankOptions | None = None
    auto: FormatBudget | None = None
    training: TrainingOptions | None = None

    def format_of(self, linear: str) -> Format:
        """Return the format of a Linear by its full name, before ``auto`` changes it."""
        chosen = self.linears
        for override in self.overrides:
            if any(fnmatchcase(linear, pattern) for pattern in override.linears):
                chosen = override.format
        return chosen


@cache
def named_recipe(name: str) -> Recipe:
    """Return a recipe that comes with the pack.

    Raises:
        RecipeError: There is none of that name.
    """
    if name not in RECIPES:
        raise RecipeError(name, f"there is none of that name; there are {', '.join(RECIPES)}")
    return read_recipe(_FOLDER / f"{name}.yaml")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: It is not YAML, has unknown keys or values, or another name than the file.
    """
    try:
        if path.stat().st_size > _MAX_RECIPE_BYTES:
            raise RecipeError(path.name, f"it is larger than {_MAX_RECIPE_BYTES >> 10} KiB")
        recipe = Recipe.model_validate(_plain_yaml(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise RecipeError(path.name, f"{where}: {first['msg']}") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        # ValueError: text that is not UTF-8, or a date or number that YAML cannot make of its text
        raise RecipeError(path.name, f"it cannot be read ({_one_line(error)})") from error
    if recipe.name != path.stem:
        raise RecipeError(path.name, f"its name is '{recipe.name}', not '{path.stem}'")
    return recipe


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without tags, anchors and aliases, and with every key once.

    Tags make Python values of texts, aliases make gigabytes of a few lines, and of a key that
    occurs twice YAML takes the last.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise yaml.YAMLError(f"{event.start_mark}: tags, anchors and aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"{node.start_mark}: it has {twice[:100]!r} twice")
        return super().construct_mapping(node, deep)


def _plain_yaml(text: str) -> Any:
    loader = _PlainLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class QuantizeOptions(_Frozen):
    """Everything the user chooses about quantization.

    Attributes:
        recipe: How Linears are quantized.
        fp8_attention: Calibrate q, k and v, so that plans run attention in FP8.
        modulation: Storage of the modulation Linears, which stay outside of plans.
        percentile: Share of tokens, in percent, whose largest value must fit into the range of an
            activation scale; 100 is the maximum over all tokens.
        headroom: Factor on that value.
    """

    recipe: Recipe = Field(default_factory=lambda: named_recipe(RECIPES[0]))
    fp8_attention: bool = True
    modulation: Format = "bf16"
    percentile: float = Field(default=100.0, ge=90.0, le=100.0)
    headroom: float = Field(default=1.25, ge=1.0, le=16.0)


def quantize_options(
    recipe: Recipe,
    fp8_attention: bool,
    modulation: Format,
    percentile: float,
    headroom: float,
    quality_floor: float,
    size_limit: float,
) -> QuantizeOptions:
    """Return options as a user enters them.

    Args:
        recipe: How Linears are quantized.
        fp8_attention: See ``QuantizeOptions``, as the next three.
        modulation: As above.
        percentile: As above.
        headroom: As above.
        quality_floor: Of recipe ``auto``, in dB; 0 takes the recipe's own.
        size_limit: Of recipe ``auto``, in GiB; 0 is none.

    Raises:
        RecipeError: A budget is set for a recipe that has none.
        pydantic.ValidationError: A value is outside its limits.
    """
    return QuantizeOptions(
        recipe=_with_budget(recipe, quality_floor, size_limit),
        fp8_attention=fp8_attention,
        modulation=modulation,
        percentile=percentile,
        headroom=headroom,
    )


def _with_budget(recipe: Recipe, quality_floor: float, size_limit: float) -> Recipe:
    if not (quality_floor or size_limit):
        return recipe
    if recipe.auto is None:
        raise RecipeError(
            recipe.name, "it has a fixed format per Linear, so no quality floor and no size limit"
        )
    # a limit alone replaces the recipe's floor: it asks for the best that fits
    budget = FormatBudget(
        floor_db=quality_floor or None,
        max_bytes=round(size_limit * 2**30) or None,
    )
    return recipe.model_copy(update={"auto": budget})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
