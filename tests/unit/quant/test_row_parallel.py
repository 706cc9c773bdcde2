from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from flux_fp4.quant.nvfp4 import quantize_weight
from flux_fp4.quant.row_parallel import for_row_chunks

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
        for_row_chunks(count, rows, CPU)
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
        for_row_chunks(fail, 1000, CPU)
