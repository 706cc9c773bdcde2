from __future__ import annotations

from pathlib import Path

import pytest
from flux_fp4.quant import recipe as recipe_module
from flux_fp4.quant.errors.recipes import RecipeError
from flux_fp4.quant.recipe import RECIPES, QuantizeOptions, Recipe, named_recipe, read_recipe
from pydantic import ValidationError


def test_every_recipe_file_is_listed_and_every_listed_one_is_a_file() -> None:
    folder = Path(recipe_module.__file__).parent / "recipes"
    assert sorted(RECIPES) == sorted(path.stem for path in folder.iterdir())
    assert QuantizeOptions().recipe.name == RECIPES[0] == "nvfp4-max"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_reads_and_says_its_trade_off_in_one_line(name: str) -> None:
    recipe = named_recipe(name)
    assert recipe.name == name
    assert "\n" not in recipe.summary
    assert recipe.summary.endswith(".")


def test_last_matching_override_wins() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "mine",
            "summary": "Mine.",
            "linears": "nvfp4",
            "overrides": [
                {"linears": ["*.img_mlp.*", "*.linear2"], "format": "fp8"},
                {"linears": ["double_blocks.0.*"], "format": "bf16"},
            ],
        }
    )
    assert recipe.format_of("double_blocks.0.img_mlp.2") == "bf16"
    assert recipe.format_of("double_blocks.1.img_mlp.2") == "fp8"
    assert recipe.format_of("double_blocks.10.img_attn.qkv") == "nvfp4"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: x\nsummary: s\nlinears: nvfp4\nspeed: 11\n", "speed: Extra inputs"),
        ("name: x\nsummary: s\nlinears: int4\n", "linears: Input should be 'nvfp4', 'fp8'"),
        ("name: y\nsummary: s\nlinears: fp8\n", "its name is 'y', not 'x'"),
        ("name: x\nsummary: s\n", "linears: Field required"),
        ("- name\n", "the file: Input should be"),
        ("name: [x\n", "it cannot be read"),
        ("!!python/object/apply:os.getcwd []\n", "it cannot be read"),
        ("name: x\nsummary: s\nlinears: nvfp4\nauto: {}\n", "auto: Value error, a budget needs"),
        ("name: x\nsummary: s\nlinears: nvfp4\nlow_rank: {rank: 7}\n", "low_rank.rank: Input"),
        ("name: ../x\nsummary: s\nlinears: nvfp4\n", "name: String should match"),
    ],
    ids=["key", "value", "name", "absent", "list", "yaml", "code", "budget", "rank", "path"],
)
def test_wrong_recipe_file_is_refused_with_the_place(
    text: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert reason in str(caught.value)
    assert "x.yaml" in str(caught.value)


def test_huge_or_binary_recipe_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("#" * 70_000)
    with pytest.raises(RecipeError, match="larger than 64 KiB"):
        read_recipe(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(path)


def test_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match="nvfp4-svdquant-r32"):
        named_recipe("int4")


@pytest.mark.parametrize("options", [{"percentile": 50.0}, {"headroom": 0.5}, {"modulation": "q4"}])
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        QuantizeOptions(**options)  # type: ignore[arg-type]
