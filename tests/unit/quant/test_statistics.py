from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flux_fp4.quant.calibration import SampleState, embedded_samples
from flux_fp4.quant.errors.calibration import NotFiniteError
from flux_fp4.quant.flux.config import block_linears
from flux_fp4.quant.flux.layers import JointAttention
from flux_fp4.quant.nvfp4 import fake_quantize_activation, quantize_weight
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.quant.stack import run_block
from flux_fp4.quant.statistics import (
    PROBE_TOKENS,
    ROWS,
    BlockObserver,
    BlockStatistics,
    probe_states,
    spread,
)
from flux_fp4.quant.statistics_files import StatisticsFolder
from tiny_flux import TINY, random_flux, random_samples
from torch import nn
from torch.nn import functional

BLOCK = "double_blocks.0"


@pytest.fixture(scope="module")
def states() -> list[SampleState]:
    with torch.no_grad():
        return embedded_samples(random_samples(), random_flux(), TINY)


def observed(states: list[SampleState]) -> BlockStatistics:
    block = random_flux().double_blocks[0]
    linears = block_linears(BLOCK)
    with torch.no_grad(), BlockObserver(BLOCK, block, linears, len(states)) as observer:
        for state in states:
            run_block(block, state)
    return observer.statistics(probe_states(states))


@pytest.fixture(scope="module")
def statistics(states: list[SampleState]) -> BlockStatistics:
    return observed(states)


def inputs_of(states: list[SampleState], linear: str) -> torch.Tensor:
    block = random_flux().double_blocks[0]
    seen: list[torch.Tensor] = []
    block.get_submodule(linear).register_forward_pre_hook(
        lambda _, x: seen.append(x[0].flatten(0, -2))
    )
    with torch.no_grad():
        for state in states:
            run_block(block, state)
    return torch.cat(seen)


@pytest.mark.parametrize("linear", block_linears(BLOCK))
def test_ranges_and_channels_are_those_of_every_input(
    linear: str, states: list[SampleState], statistics: BlockStatistics
) -> None:
    x, seen = inputs_of(states, linear), statistics.linears[linear]
    assert seen.range.amax == x.abs().max().item()
    assert torch.equal(seen.channel_amax, x.abs().amax(0))
    torch.testing.assert_close(seen.mean_square, x.square().mean(0), rtol=1e-5, atol=0)
    token_amax = x.abs().amax(1).sort().values
    for percentile in (90.0, 95.05, 99.9, 100.0):
        share = (token_amax <= seen.range.at(percentile) * (1 + 1e-6)).double().mean().item()
        assert share >= percentile / 100 - 1 / len(token_amax), percentile
    assert seen.range.at(90.0) < seen.range.amax


def test_rows_are_inputs_of_all_samples(
    states: list[SampleState], statistics: BlockStatistics
) -> None:
    x = inputs_of(states, "img_mlp.2").bfloat16()
    rows = statistics.linears["img_mlp.2"].rows
    assert rows.shape == (min(ROWS, len(x)), x.shape[1])
    per_sample = len(x) // len(states)
    found = [(x == row).all(1).nonzero()[0].item() // per_sample for row in rows]
    assert set(found) == set(range(len(states)))


def test_order_of_samples_does_not_matter(
    states: list[SampleState], statistics: BlockStatistics
) -> None:
    backwards = observed(states[::-1])
    for linear, seen in statistics.linears.items():
        other = backwards.linears[linear]
        assert torch.equal(seen.range.quantiles, other.range.quantiles), linear
        assert torch.equal(seen.channel_amax, other.channel_amax), linear
        torch.testing.assert_close(seen.mean_square, other.mean_square, rtol=1e-6, atol=0)
        assert torch.equal(seen.rows.sort(0).values, other.rows.sort(0).values), linear
    for part, seen in statistics.attention.items():
        assert torch.equal(seen.quantiles, backwards.attention[part].quantiles), part


def test_sqnr_on_the_rows_is_that_on_all_inputs() -> None:
    # FLUX-like: few channels with large values, many tokens
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 512, generator=generator)
    x *= torch.rand(512, generator=generator).pow(-0.5).clamp(max=20)
    weight = torch.randn(256, 512, generator=generator) * 512**-0.5
    quantized, scale = quantize_weight(weight, "w").dequantize(), x.abs().max() / 2688

    def measured(tokens: torch.Tensor) -> float:
        actual = functional.linear(fake_quantize_activation(tokens, scale), quantized)
        return sqnr_db(functional.linear(tokens, weight), actual)

    everything, rows = measured(x), measured(x[spread(len(x), ROWS)])
    assert abs(everything - rows) < 0.3, f"{everything:.2f} dB on all, {rows:.2f} dB on the rows"


def test_probes_keep_few_tokens_and_their_positions(states: list[SampleState]) -> None:
    long = SampleState(
        torch.randn(1, 300, 8), torch.randn(1, 90, 8), states[0].vec, *(torch.randn(1, 390, 4),) * 2
    )
    (probe,) = probe_states([long])
    assert probe.txt is not None
    assert probe.img.shape[1] == probe.txt.shape[1] == PROBE_TOKENS
    for index in (0, 17, PROBE_TOKENS - 1):
        at = (long.img.bfloat16() == probe.img[:, index]).all(-1).nonzero()[0, 1]
        assert torch.equal(probe.cos[0, PROBE_TOKENS + index], long.cos[0, 90 + at])


def test_nan_is_named(states: list[SampleState]) -> None:
    broken = [
        SampleState(*(getattr(states[0], name) for name in ("img", "txt", "vec", "cos", "sin")))
    ]
    broken[0].img = torch.full_like(broken[0].img, torch.nan)
    with pytest.raises(NotFiniteError, match=r"double_blocks\.0\.img_attn\.qkv"):
        observed(broken)


def test_files_give_back_what_was_written(statistics: BlockStatistics, tmp_path: Path) -> None:
    folder = StatisticsFolder(tmp_path, "a" * 64, "b" * 64)
    assert folder.read(BLOCK) is None
    folder.write(BLOCK, statistics)
    read = folder.read(BLOCK)
    assert read is not None
    assert read.linears.keys() == statistics.linears.keys()
    for linear, seen in statistics.linears.items():
        assert torch.equal(read.linears[linear].rows, seen.rows)
        assert torch.equal(read.linears[linear].range.quantiles, seen.range.quantiles)
    assert len(read.probes) == len(statistics.probes)
    assert torch.equal(read.probes[1].img, statistics.probes[1].img)
    assert read.probes[0].shared_mods is None


def test_files_of_others_and_damaged_ones_are_made_again(
    statistics: BlockStatistics, tmp_path: Path
) -> None:
    folder = StatisticsFolder(tmp_path, "a" * 64, "b" * 64)
    folder.write(BLOCK, statistics)
    # equal in the digits that name the folder
    assert StatisticsFolder(tmp_path, "a" * 63 + "c", "b" * 64).read(BLOCK) is None
    path = folder.path / f"{BLOCK}.safetensors"
    path.rename(folder.path / "single_blocks.0.safetensors")
    assert folder.read("single_blocks.0") is None
    path.write_bytes(b"\xff" * 100)
    assert folder.read(BLOCK) is None


@pytest.mark.parametrize("offset", [0.0, 0.3, 0.5, 0.999])
@pytest.mark.parametrize(("length", "count"), [(5, 5), (100, 7), (4096, 128), (3, 10)])
def test_spread_is_in_order_and_in_range(length: int, count: int, offset: float) -> None:
    places = spread(length, count, offset)
    assert len(places) == min(length, count)
    assert (places.diff() > 0).all()
    assert places.min() >= 0
    assert places.max() < length


def test_samples_show_tokens_of_different_places() -> None:
    block = nn.Module()
    block.linear, block.attention = nn.Linear(16, 16), JointAttention()
    places = torch.arange(1.0, 201.0)[:, None].expand(200, 16)
    heads = places.reshape(1, 1, 200, 16)
    with BlockObserver("b", block, ["linear"], 3) as observer:
        for _ in range(3):
            block.linear(places)
            block.attention(heads, heads, heads)
    seen = observer.statistics(()).linears["linear"].rows[:, 0]
    assert len(seen) == 3 * 43
    assert len(seen.unique()) > 2 * 43
