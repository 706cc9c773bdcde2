"""What docs/recipes.md says about recipes is what they are."""

from __future__ import annotations

import re
from pathlib import Path

from flux_fp4.quant.recipe import RECIPES, read_recipe
from pack_import import ROOT

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_example_is_a_recipe(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "careful.yaml"
    path.write_text(example)
    recipe = read_recipe(path)
    assert recipe.format_of("double_blocks.1.img_mlp.0") == "fp8"
    assert recipe.format_of("double_blocks.0.img_mlp.0") == "bf16"
    assert recipe.format_of("single_blocks.0.linear1") == "nvfp4"
    assert recipe.low_rank is not None
    assert recipe.low_rank.rank == 32


def test_table_has_every_recipe_in_the_order_of_the_picker() -> None:
    table = PAGE[: PAGE.index("\n\n", PAGE.index("\n|"))]
    assert re.findall(r"^\| `([\w.-]+)` \|", table, re.MULTILINE) == list(RECIPES)
