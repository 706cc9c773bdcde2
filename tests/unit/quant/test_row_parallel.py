from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from flux_fp4.quant.nvfp4 import quantize_weight
from flux_fp4.quant.row_parallel import for_row_chunks, side_by_side

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 64, 65, 1000])
def test_every_row_is_worked_on_once(rows: int, threads: int) -> None:
    seen = torch.zeros(rows, dtype=torch.int32)

    def count(chunk: slice) -> None:
        seen[chunk] += 1

    with torch.inference_mode():
        for_row_chunks(count, (rows, 4096), CPU)
    assert (seen == 1).all()
    assert torch.get_num_threads() == threads


def test_result_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    weight = torch.randn(500, 512, generator=torch.Generator().manual_seed(0))
    found = quantize_weight(weight, "w", "mse")
    torch.set_num_threads(1)
    alone = quantize_weight(weight, "w", "mse")
    assert torch.equal(found.packed, alone.packed)
    assert torch.equal(found.block_scale.view(torch.uint8), alone.block_scale.view(torch.uint8))


def test_failure_on_one_piece_is_raised(threads: int) -> None:
    def fail(chunk: slice) -> None:
        if chunk.start == 128:
            raise ValueError("row 128")

    with pytest.raises(ValueError, match="row 128"):
        for_row_chunks(fail, (1000, 4096), CPU)


def test_results_come_in_the_order_of_the_pieces(threads: int) -> None:
    def piece(index: int) -> tuple[int, int, bool]:
        return index, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        found = side_by_side([partial(piece, index) for index in range(5)], CPU)
    assert [index for index, _, _ in found] == list(range(5))
    # more pieces than threads: each has one thread of its own
    assert {count for _, count, _ in found} == {1}
    assert not any(grad for _, _, grad in found)


def test_few_pieces_share_the_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert side_by_side([torch.get_num_threads] * 2, CPU) == [2, 2]
    finally:
        torch.set_num_threads(before)
