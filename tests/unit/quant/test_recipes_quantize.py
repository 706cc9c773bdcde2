"""Every recipe end to end on a small random model: tensors, reports, order of quality."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint, QuantizedMetadata
from flux_fp4.quant.recipe import RECIPES, QuantizeOptions
from quantize_tiny import quantize, with_recipe
from tiny_flux import TINY

TINY_RECIPES = [name for name in RECIPES if not name.endswith(("r64", "r128"))]


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, QuantizedCheckpoint]:
    """The same model by every recipe."""
    folder = tmp_path_factory.mktemp("recipes")
    return {
        name: quantize(
            source, folder / f"{name}.safetensors", with_recipe(name), statistics=folder / "s"
        )
        for name in TINY_RECIPES
    }


def output_db(metadata: QuantizedMetadata) -> float:
    return fmean(report.output_sqnr_db for report in metadata.linears)


@pytest.mark.parametrize("name", TINY_RECIPES)
def test_report_says_in_which_format_each_linear_is(
    name: str, made: dict[str, QuantizedCheckpoint]
) -> None:
    checkpoint = made[name]
    assert checkpoint.metadata.recipe == name
    for report in checkpoint.metadata.linears:
        assert checkpoint.linear_format(report.name) == report.format
        low = {"nvfp4": 12, "fp8": 25, "bf16": 200}[report.format]
        assert report.output_sqnr_db >= low, f"{report.name}: {report.output_sqnr_db:.1f} dB"


def test_better_recipes_are_better(made: dict[str, QuantizedCheckpoint]) -> None:
    db = {name: output_db(checkpoint.metadata) for name, checkpoint in made.items()}
    order = ["nvfp4-max", "nvfp4-mse", "nvfp4-fp8mix", "fp8", "bf16"]
    assert sorted(order, key=db.__getitem__) == order, db
    assert db["nvfp4-mse"] < db["nvfp4-svdquant-r16"] < db["nvfp4-svdquant-r32"], db


def test_only_svdquant_has_branches_and_only_smoothed_recipes_have_scales(
    made: dict[str, QuantizedCheckpoint],
) -> None:
    for name, checkpoint in made.items():
        branches = [tensor for tensor in checkpoint.tensors if tensor.endswith(".svd_down")]
        scales = [tensor for tensor in checkpoint.tensors if tensor.endswith(".pre_quant_scale")]
        linears = 8 * TINY.depth + 2 * TINY.depth_single_blocks
        assert len(branches) == (linears if "svdquant" in name else 0), name
        assert len(scales) == (linears if "svdquant" in name or "awq" in name else 0), name
    rank = made["nvfp4-svdquant-r32"].tensors["single_blocks.0.linear1.svd_down"].shape[0]
    assert rank == 32


@pytest.mark.parametrize("name", ["nvfp4-max", "nvfp4-svdquant-r16", "fp8"])
def test_result_is_the_same_whatever_was_quantized_before(
    name: str, source: Path, made: dict[str, QuantizedCheckpoint], tmp_path: Path
) -> None:
    again = quantize(source, tmp_path / f"{name}.safetensors", with_recipe(name))
    assert again.path.read_bytes() == made[name].path.read_bytes()


@pytest.mark.parametrize("storage", ["fp8", "nvfp4"])
def test_quantized_modulation_is_smaller_and_close(
    storage: str, source: Path, quantized: QuantizedCheckpoint, tmp_path: Path
) -> None:
    options = QuantizeOptions(modulation=storage)  # type: ignore[arg-type]
    result = quantize(source, tmp_path / "q.safetensors", options)
    linear = "double_blocks.0.img_mod.lin"
    assert f"{linear}.comfy_quant" in result.high_precision_state_dict()
    assert (
        result.tensors[f"{linear}.weight"].length
        < 0.55 * quantized.tensors[f"{linear}.weight"].length
    )
    assert result.tensors[f"{linear}.bias"].dtype == "BF16"
    assert result.path.stat().st_size < quantized.path.stat().st_size
