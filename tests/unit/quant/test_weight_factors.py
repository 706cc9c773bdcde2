from __future__ import annotations

import pytest
import torch
from flux_fp4.quant.emulation import emulated_linear
from flux_fp4.quant.nvfp4 import quantize_weight
from flux_fp4.quant.weight_factors import (
    TOLERANCE,
    WeightFactors,
    beside_stored,
    factorized,
    joined,
    stored_weight,
)
from torch import Tensor

N, K = 48, 64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(smoothing: bool, branch: bool) -> dict[str, Tensor]:
    packed = quantize_weight(random(N, K), "linear1", "max", None)
    tensors = {
        "linear1.weight": packed.packed,
        "linear1.weight_scale": packed.block_scale,
        "linear1.weight_scale_2": packed.global_scale,
        "linear1.input_scale": torch.tensor(0.01),
    }
    if smoothing:
        tensors["linear1.pre_quant_scale"] = random(K, seed=1).exp().bfloat16()
    if branch:
        tensors["linear1.svd_up"] = random(N, 3, seed=2).bfloat16()
        tensors["linear1.svd_down"] = random(3, K, seed=3).bfloat16()
    return tensors


def change(rank: int, seed: int = 4) -> WeightFactors:
    return WeightFactors(random(N, rank, seed=seed), random(rank, K, seed=seed + 1))


def test_joined_changes_are_their_sum() -> None:
    first, second = change(2), change(5, seed=9)
    both = joined([first, second])
    assert both.rank == 7
    expected = first.up @ first.down + second.up @ second.down
    torch.testing.assert_close(both.up @ both.down, expected, rtol=1e-5, atol=1e-5)
    assert joined([first]) is first


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_exact_rank_is_found(rank: int) -> None:
    exact = change(rank)
    factors, error = factorized(exact.up @ exact.down, max_rank=30)
    assert factors.rank == rank
    assert error < TOLERANCE


def test_error_is_that_of_the_best_factors() -> None:
    matrix = random(N, K)
    factors, error = factorized(matrix, max_rank=10)
    assert factors.rank == 10
    sizes = torch.linalg.svdvals(matrix)
    best = (sizes[10:].square().sum() / sizes.square().sum()).sqrt().item()
    assert best <= error < 1.01 * best
    left = torch.linalg.vector_norm(matrix - factors.up @ factors.down)
    assert error == pytest.approx((left / torch.linalg.vector_norm(matrix)).item(), rel=1e-4)


def test_no_change_has_factors_of_zero() -> None:
    factors, error = factorized(torch.zeros(N, K), max_rank=10)
    assert error == 0
    assert (factors.up.shape, factors.down.shape) == ((N, 1), (1, K))
    assert not (factors.up @ factors.down).any()


@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("branch", [False, True])
def test_stored_weight_is_what_multiplies_the_original_input(smoothing: bool, branch: bool) -> None:
    tensors = stored(smoothing, branch)
    emulated = emulated_linear("linear1", tensors, None)
    emulated.quantize_input = None
    x = random(7, K, seed=8)
    expected = emulated(x)
    torch.testing.assert_close(
        x @ stored_weight("linear1", tensors).T, expected, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("branch", [False, True])
def test_factors_beside_the_stored_weight_add_the_change(smoothing: bool, branch: bool) -> None:
    tensors = stored(smoothing, branch)
    wanted = change(4)
    factors = beside_stored("linear1", tensors, wanted)
    assert factors is not None
    assert factors.rank == 4 + 3 * branch
    emulated = emulated_linear("linear1", tensors, None)
    emulated.quantize_input = None
    x = random(7, K, seed=8)
    expected = emulated(x) + x @ (wanted.up @ wanted.down).T
    # the variant of a block has no branch but the factors
    emulated.branch = (factors.down, factors.up)
    torch.testing.assert_close(emulated(x), expected, rtol=1e-4, atol=1e-3)


def test_branch_alone_and_nothing_at_all() -> None:
    tensors = stored(smoothing=True, branch=True)
    alone = beside_stored("linear1", tensors, None)
    assert alone is not None
    assert torch.equal(alone.up, tensors["linear1.svd_up"].float())
    assert torch.equal(alone.down, tensors["linear1.svd_down"].float())
    assert beside_stored("linear1", stored(smoothing=True, branch=False), None) is None
