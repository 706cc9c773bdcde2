from __future__ import annotations

import pytest
import torch
from flux_fp4.quant.emulation import emulated_linear
from flux_fp4.quant.linear_quantizer import activation_amax, quantize_linear, smoothing_scales
from flux_fp4.quant.modelopt_calibration import awq_pre_quant_scale
from flux_fp4.quant.recipe import QuantizeOptions, named_recipe
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.quant.statistics import QUANTILES, LinearStatistics, RangeStatistics
from quantize_tiny import with_recipe
from torch import Tensor
from torch.nn import functional

K = 256


def heavy_inputs(tokens: int, seed: int = 0) -> Tensor:
    """Inputs with outlier channels, as FLUX's are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, K, generator=generator)
    return x * torch.rand(K, generator=torch.Generator().manual_seed(9)).pow(-0.7).clamp(max=30)


def statistics_of(x: Tensor) -> LinearStatistics:
    ordered = x.abs().amax(1).sort().values
    index = torch.linspace(0, len(ordered) - 1, QUANTILES).ceil().long()
    return LinearStatistics(
        RangeStatistics(ordered[index]), x.abs().amax(0), x.square().mean(0), x[:128].bfloat16()
    )


def weight_of(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    factors = torch.rand(K, generator=generator) + 0.2
    return torch.randn(rows, K, generator=generator) * factors * K**-0.5


def output_db(weight: Tensor, parts: dict[str, Tensor], x: Tensor) -> float:
    emulated = emulated_linear("w", {f"w.{part}": t for part, t in parts.items()}, None)
    return sqnr_db(functional.linear(x, weight), emulated(x))


def test_smoothing_on_a_sample_of_outputs_is_as_good_as_on_all() -> None:
    weight, x = weight_of(6144), heavy_inputs(2000)
    statistics, options = statistics_of(x), with_recipe("nvfp4-awq")
    sampled = smoothing_scales(
        {"w": weight}, {"w": statistics}, options.recipe, {"w": "nvfp4"}, lambda: None
    )["w"]
    full = awq_pre_quant_scale({"w": (weight, statistics.rows.float())})["w"].bfloat16()
    measured = {}
    for name, scale in (("sample", sampled), ("all", full), ("none", None)):
        parts = quantize_linear("w", weight, None, statistics, options, "nvfp4", scale)
        measured[name] = output_db(weight, parts, heavy_inputs(500, seed=5))
    assert abs(measured["sample"] - measured["all"]) < 0.1, measured
    assert measured["sample"] > measured["none"] + 0.3, measured


@pytest.mark.parametrize("name", ["nvfp4-max", "nvfp4-awq", "nvfp4-svdquant-r16", "fp8"])
def test_range_of_the_input_reaches_what_was_seen_with_headroom(name: str) -> None:
    weight, x = weight_of(512), heavy_inputs(2000)
    statistics, options = statistics_of(x), with_recipe(name)
    scales = smoothing_scales(
        {"w": weight},
        {"w": statistics},
        options.recipe,
        {"w": options.recipe.format_of("w")},
        lambda: None,
    )
    scale = scales.get("w")
    chosen = options.recipe.format_of("w")
    parts = quantize_linear("w", weight, None, statistics, options, chosen, scale)
    reach = parts["input_scale"].item() * (448 if chosen == "fp8" else 2688)
    smoothed = x if scale is None else x * scale.float()
    assert reach == pytest.approx(1.25 * smoothed.abs().max().item(), rel=1e-3)


def test_percentile_leaves_out_the_largest_tokens() -> None:
    x = heavy_inputs(1000)
    x[17] *= 50
    statistics = statistics_of(x)
    everything = activation_amax(statistics, QuantizeOptions(headroom=1.0), None)
    most = activation_amax(statistics, QuantizeOptions(headroom=1.0, percentile=99.0), None)
    assert everything == x.abs().max().item()
    assert most < everything / 10


def test_refined_branch_is_no_worse_than_the_first() -> None:
    weight, x = weight_of(512), heavy_inputs(2000)
    statistics = statistics_of(x)
    recipe = named_recipe("nvfp4-svdquant-r16")
    assert recipe.low_rank is not None
    refined = recipe.model_copy(
        update={"low_rank": recipe.low_rank.model_copy(update={"refinements": 3})}
    )
    found = [
        output_db(
            weight,
            quantize_linear("w", weight, None, statistics, QuantizeOptions(recipe=chosen), "nvfp4"),
            x,
        )
        for chosen in (recipe, refined)
    ]
    assert found[1] > found[0] - 0.05, found
