"""Every stage tells how long each block took, in units that compare blocks of one kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flux_fp4.quant.durations import (
    EXPORT,
    FINISH,
    block_operations,
    block_weights,
    calibrate_work,
    linears_formats,
    measure_work,
    quantize_work,
)
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.quantize import quantize_checkpoint
from flux_fp4.quant.sources.source import open_source
from quantize_tiny import with_recipe
from tiny_flux import TINY, ignore_progress, random_flux, random_samples, save_flux

BLOCKS = TINY.block_names


def recorded(folder: Path, recipe: str) -> list[tuple[str, float, float]]:
    source = open_source(save_flux(random_flux(), folder / "source.safetensors"))
    told: list[tuple[str, float, float]] = []

    def record(work: str, units: float, seconds: float) -> None:
        told.append((work, units, seconds))

    path = folder / "tiny" / "tiny.safetensors"
    arguments = (random_samples(), with_recipe(recipe), folder / "statistics", ignore_progress)
    quantize_checkpoint(source, path, *arguments, dtype=torch.float32, record=record)
    export_blocks(path, ignore_progress, record)
    assert all(units > 0 and seconds > 0 for _, units, seconds in told)
    return told


def test_every_block_of_every_stage_is_told(tmp_path: Path) -> None:
    told = recorded(tmp_path, "nvfp4-max")
    options = with_recipe("nvfp4-max")
    assert [work for work, *_ in told] == [
        *(calibrate_work(block, "cpu") for block in BLOCKS),
        *(quantize_work(b, linears_formats(b, options), options, "cpu") for b in BLOCKS),
        FINISH,
        *[EXPORT] * len(BLOCKS),
    ]
    assert told[-1][1] == 4


def test_units_are_weights_operations_and_bytes(tmp_path: Path) -> None:
    told = recorded(tmp_path, "nvfp4-max")
    source = open_source(tmp_path / "source.safetensors")
    state = random_flux().state_dict()
    weights = [
        sum(value.numel() for name, value in state.items() if name.startswith(f"{block}."))
        for block in BLOCKS
    ]
    assert [block_weights(source, block) for block in BLOCKS] == weights
    assert [units for _, units, _ in told[3:6]] == weights
    # two pictures at two noise levels: 6 x 8 latent pixels are 12 tokens, and 10 of text
    tokens = [22] * 4
    assert [units for _, units, _ in told[:3]] == [
        block_operations(TINY, block, count, tokens)
        for block, count in zip(BLOCKS, weights, strict=True)
    ]
    outside = sum(value.numel() for name, value in state.items() if "_blocks." not in name)
    assert told[6][1] == 2 * outside


def test_auto_measures_first_and_is_compared_with_itself(tmp_path: Path) -> None:
    told = recorded(tmp_path, "auto")
    assert [work for work, *_ in told[3:6]] == [measure_work(block, "cpu") for block in BLOCKS]
    assert all(work.startswith("quantize") and ", auto," in work for work, *_ in told[6:9])


@pytest.mark.parametrize(
    "other",
    [
        with_recipe("nvfp4-mse"),
        with_recipe("nvfp4-awq"),
        with_recipe("nvfp4-svdquant-r16"),
        with_recipe("nvfp4-svdquant-r32"),
        with_recipe("fp8"),
        with_recipe("nvfp4-max", modulation="nvfp4"),
    ],
)
def test_what_changes_the_cost_changes_the_name(other: object) -> None:
    def name(options: object, device: str = "cpu") -> str:
        return quantize_work(BLOCKS[0], linears_formats(BLOCKS[0], options), options, device)

    plain = with_recipe("nvfp4-max")
    assert name(other) != name(plain)
    assert name(plain, "cuda:0") == name(plain, "cuda:1") != name(plain)
    assert name(with_recipe("nvfp4-max", headroom=2.0)) == name(plain)


def test_operations_of_flux1_dev() -> None:
    """74 TFLOP per step at 4,608 tokens, 15 of them attention."""
    config = TINY.model_copy(update={"hidden_size": 3072})
    attention = 57 * block_operations(config, "single_blocks.0", 0, [4608])
    assert attention == pytest.approx(15e12, rel=0.02)
