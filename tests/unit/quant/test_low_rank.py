from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from flux_fp4.quant.low_rank import LowRankBranch, low_rank_branch
from flux_fp4.quant.nvfp4 import quantize_weight
from flux_fp4.quant.sqnr import sqnr_db

quantize = partial(quantize_weight, linear="linear")


def decaying(exponent: float, noise: float, rows: int = 384, columns: int = 512) -> torch.Tensor:
    """A weight whose singular values fall as a power, over a floor of noise, as trained ones do."""
    generator = torch.Generator().manual_seed(0)
    rank = min(rows, columns) // 2
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, rank, generator=generator)).Q
    weight = (left * torch.arange(1, rank + 1).float() ** -exponent) @ right.mT
    floor = torch.randn(rows, columns, generator=generator) / (rows * columns) ** 0.5
    return weight / weight.norm() * (1 - noise) ** 0.5 + floor * noise**0.5


WEIGHTS = {
    "steep": lambda: decaying(1.0, 0.1),
    "medium": lambda: decaying(0.5, 0.5),
    "flat": lambda: decaying(0.3, 0.9),
    "tall": lambda: decaying(0.7, 0.3, rows=768, columns=128),
    "wide": lambda: decaying(0.7, 0.3, rows=128, columns=768),
}


def energy(tensor: torch.Tensor) -> float:
    return tensor.double().square().sum().item()


def error_energy(branch: LowRankBranch) -> float:
    return energy(branch.residual - quantize(branch.residual).dequantize())


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_randomized_branch_leaves_hardly_more_than_the_best_one(
    make: Callable[[], torch.Tensor],
) -> None:
    weight = make()
    optimum = torch.linalg.svdvals(weight.double())[32:].square().sum().item()
    ratio = energy(low_rank_branch(weight, 32).residual) / optimum
    assert 1 - 1e-4 < ratio < 1.02, f"residual holds {ratio:.4f} of the smallest possible energy"


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_full_branch_leaves_what_eckart_and_young_say(make: Callable[[], torch.Tensor]) -> None:
    weight = make()
    optimum = torch.linalg.svdvals(weight.double())[32:].square().sum().item()
    ratio = energy(low_rank_branch(weight, 32, method="full").residual) / optimum
    # the factors are rounded to bf16: 2^-9 of the branch, which holds up to 90 % of the energy
    assert 1 <= ratio < 1.001, f"residual holds {ratio:.6f} of the smallest possible energy"


@pytest.mark.parametrize("method", ["randomized", "full"])
def test_residual_and_rounded_branch_add_up_to_the_weight(method: str) -> None:
    weight = decaying(1.0, 0.1)
    branch = low_rank_branch(weight, 32, method)
    assert (branch.up.dtype, branch.down.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (branch.up.shape, branch.down.shape) == ((384, 32), (32, 512))
    rebuilt = branch.up.double() @ branch.down.double() + branch.residual.double()
    db = sqnr_db(weight, rebuilt)
    assert db > 120, f"{db:.1f} dB; the unrounded factors would give about 50"


def test_branch_raises_the_sqnr_of_the_quantized_weight() -> None:
    weight = decaying(1.0, 0.1)
    plain = sqnr_db(weight, quantize(weight).dequantize())
    branch = low_rank_branch(weight, 32)
    rebuilt = branch.up.float() @ branch.down.float() + quantize(branch.residual).dequantize()
    gain = sqnr_db(weight, rebuilt) - plain
    # 88 % of the energy leave for the branch: 9 dB
    assert gain > 8, f"{plain:.2f} dB without branch, {gain:+.2f} dB with it"


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
def test_refinements_never_raise_the_error(make: Callable[[], torch.Tensor]) -> None:
    weight = make()
    errors = [
        error_energy(low_rank_branch(weight, 32, refinements=count, quantize=quantize))
        for count in (0, 1, 3)
    ]
    assert errors == sorted(errors, reverse=True), f"error energies {errors}"


def test_refinements_lower_the_error_of_a_medium_weight() -> None:
    weight = decaying(0.5, 0.5)
    once = error_energy(low_rank_branch(weight, 32))
    refined = error_energy(low_rank_branch(weight, 32, refinements=4, quantize=quantize))
    assert refined < 0.98 * once, f"refined holds {refined / once:.4f} of the one-shot error"


def test_a_refinement_that_makes_it_worse_is_dropped() -> None:
    weight = decaying(0.5, 0.5)
    once = low_rank_branch(weight, 32)
    calls = 0

    def quantize_well_once(residual: torch.Tensor) -> object:
        nonlocal calls
        calls += 1
        quantized = quantize(residual)
        return quantized if calls == 1 else quantize(torch.zeros_like(residual))

    refined = low_rank_branch(weight, 32, refinements=2, quantize=quantize_well_once)
    assert calls == 3
    assert torch.equal(refined.residual, once.residual)


def test_same_seed_same_branch_whatever_the_global_generator_says() -> None:
    weight = decaying(0.5, 0.5)
    torch.manual_seed(1)
    first = low_rank_branch(weight, 16, seed=7)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = low_rank_branch(weight, 16, seed=7)
    torch.manual_seed(1)
    assert torch.equal(first.up, again.up)
    assert torch.equal(first.down, again.down)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was drawn from"
    assert not torch.equal(first.up, low_rank_branch(weight, 16, seed=8).up)


def test_rank_beyond_the_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="no 64 singular directions"):
        low_rank_branch(torch.ones(32, 128), 64)


def test_refinements_need_to_know_the_quantizer() -> None:
    with pytest.raises(ValueError, match="say how it is quantized"):
        low_rank_branch(torch.ones(32, 128), 16, refinements=1)
