from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from flux_fp4.quant.auto_formats import BITS, Sensitivity, formats_within
from flux_fp4.quant.errors.recipes import FormatBudgetError
from flux_fp4.quant.flux.config import block_linears
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.recipe import Format, FormatBudget, QuantizeOptions, named_recipe
from quantize_tiny import quantize, with_recipe
from tiny_flux import TINY


def sensitivity(linear: str, weights: int, nvfp4: float, fp8: float) -> Sensitivity:
    return Sensitivity(linear, weights, {"nvfp4": nvfp4, "fp8": fp8, "bf16": 0.0})


BLOCKS = {
    "double_blocks.0": [
        sensitivity("double_blocks.0.a", 100, 0.010, 0.0010),
        sensitivity("double_blocks.0.b", 400, 0.012, 0.0012),
        sensitivity("double_blocks.0.c", 100, 0.001, 0.0001),
    ],
    "single_blocks.0": [sensitivity("single_blocks.0.a", 200, 0.002, 0.0002)],
}
NOTHING_FIXED = dict.fromkeys(BLOCKS, 0.0)
EVERY = [entry for entries in BLOCKS.values() for entry in entries]
START: dict[str, Format] = {entry.linear: "nvfp4" for entry in EVERY}


def noise_of(chosen: dict[str, Format]) -> float:
    return sum(entry.noise[chosen[entry.linear]] for entry in EVERY)


def bytes_of(chosen: dict[str, Format]) -> float:
    return sum(entry.bytes(chosen[entry.linear]) for entry in EVERY)


def test_floor_upgrades_what_removes_most_noise_per_byte_and_no_more() -> None:
    chosen = formats_within(FormatBudget(floor_db=18), BLOCKS, NOTHING_FIXED, START)
    # 0.023 is 16.4 dB; `a` in FP8 leaves 0.014, 18.5 dB, at the price of 44 bytes
    assert chosen == START | {"double_blocks.0.a": "fp8"}


def test_floor_that_is_met_changes_nothing() -> None:
    assert formats_within(FormatBudget(floor_db=16), BLOCKS, NOTHING_FIXED, START) == START


@pytest.mark.parametrize("floor_db", [17, 20, 25, 30, 45])
def test_every_block_reaches_the_floor(floor_db: float) -> None:
    chosen = formats_within(FormatBudget(floor_db=floor_db), BLOCKS, NOTHING_FIXED, START)
    for block, entries in BLOCKS.items():
        noise = sum(entry.noise[chosen[entry.linear]] for entry in entries)
        db = math.inf if noise == 0 else -10 * math.log10(noise)
        assert db >= floor_db, f"{block}: {db:.1f} dB"


@pytest.mark.parametrize("limit", [460, 500, 600, 700, 900, 1600])
def test_size_limit_is_kept_and_nearly_as_good_as_the_best_of_all_choices(limit: int) -> None:
    chosen = formats_within(FormatBudget(max_bytes=limit), BLOCKS, NOTHING_FIXED, START)
    assert bytes_of(chosen) <= limit
    combinations = itertools.product(BITS, repeat=len(EVERY))
    every = (dict(zip(START, formats, strict=True)) for formats in combinations)
    best = min(noise_of(other) for other in every if bytes_of(other) <= limit)
    start = noise_of(START)
    # greedy: within a tenth of what the best choice gains
    assert start - noise_of(chosen) >= 0.9 * (start - best), f"{noise_of(chosen)} vs {best}"


def test_limit_below_the_smallest_is_refused_with_both_numbers() -> None:
    with pytest.raises(FormatBudgetError, match=r"smallest weights take .* GiB are allowed"):
        formats_within(FormatBudget(max_bytes=400), BLOCKS, NOTHING_FIXED, START)


def test_limit_that_excludes_the_floor_is_refused() -> None:
    with pytest.raises(FormatBudgetError, match=r"for 30\.0 dB"):
        formats_within(FormatBudget(floor_db=30, max_bytes=460), BLOCKS, NOTHING_FIXED, START)


def test_floor_out_of_reach_of_fp8_attention_is_refused() -> None:
    fixed = NOTHING_FIXED | {"single_blocks.0": 0.001}
    with pytest.raises(FormatBudgetError, match=r"single_blocks\.0.* 30\.0 dB .*attention"):
        formats_within(FormatBudget(floor_db=40), BLOCKS, fixed, START)


def auto(**budget: float) -> QuantizeOptions:
    recipe = named_recipe("auto").model_copy(update={"auto": FormatBudget(**budget)})  # type: ignore[arg-type]
    return QuantizeOptions(recipe=recipe)


def test_measured_floor_is_reached_by_the_checkpoint(source: Path, tmp_path: Path) -> None:
    worst = {}
    for floor_db in (0.5, 24.0):
        path = tmp_path / f"{floor_db}.safetensors"
        result = quantize(source, path, auto(floor_db=floor_db), statistics=tmp_path / "s")
        worst[floor_db] = min(block.update_sqnr_db for block in result.metadata.blocks)
        formats = {report.name: report.format for report in result.metadata.linears}
        assert formats.keys() == {f"{b}.{n}" for b in TINY.block_names for n in block_linears(b)}
        for name, chosen in formats.items():
            assert result.linear_format(name) == chosen
    assert set(formats.values()) - {"nvfp4"}, "24 dB needs more than NVFP4"
    assert worst[0.5] < 22, f"{worst[0.5]:.1f} dB"
    # noises of Linears add up only nearly
    assert worst[24.0] > 23.5, f"{worst[24.0]:.1f} dB"


def test_more_bytes_give_more_quality(source: Path, tmp_path: Path) -> None:
    def made(options: QuantizeOptions, name: str) -> QuantizedCheckpoint:
        return quantize(
            source, tmp_path / f"{name}.safetensors", options, statistics=tmp_path / "s"
        )

    small = made(with_recipe("nvfp4-mse"), "small")
    weights = sum(
        math.prod(place.shape) * 2
        for name, place in small.tensors.items()
        if place.dtype == "U8" and name.endswith(".weight")
    )
    limited = made(auto(max_bytes=round(weights * 6 / 8)), "limited")
    noises = [
        sum(10 ** (-block.update_sqnr_db / 10) for block in result.metadata.blocks)
        for result in (small, limited)
    ]
    assert noises[1] < 0.7 * noises[0], noises
