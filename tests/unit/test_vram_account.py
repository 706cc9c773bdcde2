"""The published account of GPU memory, against real tensors and the MODEL's own arithmetic."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from flux_fp4.quant.flux.model import Flux, tensor_shapes
from flux_fp4.quant.quantized_checkpoint import is_in_plan
from pack_import import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from full_size import FLUX1_DEV
from vram_account import account

GB = 1e9


@pytest.fixture(scope="module")
def flux() -> Flux:
    with torch.device("meta"):
        return Flux(FLUX1_DEV)


def test_torch_weights_are_those_of_the_module(flux: Flux) -> None:
    outside = sum(
        2 * weight.numel() for name, weight in flux.named_parameters() if not is_in_plan(name)
    )
    assert account("bf16").torch_weights == outside


def test_plans_hold_the_packed_weights() -> None:
    shapes = tensor_shapes(FLUX1_DEV)
    inside = sum(
        torch.Size(shape).numel()
        for name, shape in shapes.items()
        if is_in_plan(name) and len(shape) == 2
    )
    packed = inside // 2 + inside // 16  # codes and block scales
    assert packed < account("bf16").plans < 1.04 * packed


@pytest.mark.parametrize(("modulation", "resident"), [("bf16", 12.2), ("fp8", 9.0), ("nvfp4", 7.6)])
def test_sums_stay_below(modulation: str, resident: float) -> None:
    found = account(modulation)
    assert found.resident <= resident * GB
    assert found.tabled <= 6.0 * GB
    assert found.offloaded <= 6.0 * GB
    assert found.smallest <= 1.1 * GB


def test_modulation_is_that_of_the_blocks_of_the_module(flux: Flux) -> None:
    linears = [
        module.lin
        for block in (*flux.double_blocks, *flux.single_blocks)
        for name, module in block.named_children()
        if name in ("img_mod", "txt_mod", "modulation")
    ]
    assert len(linears) == 19 * 2 + 38
    found = account("bf16")
    assert found.modulation_weights == sum(2 * p.numel() for m in linears for p in m.parameters())
    assert found.largest_modulation == max(linear.weight.numel() for linear in linears)


def test_page_has_these_numbers() -> None:
    page = (ROOT / "docs" / "memory.md").read_text()
    stated = [int(number.replace(",", "")) for number in re.findall(r"\b[\d,]{7,}\b", page)]
    for modulation in ("bf16", "fp8", "nvfp4"):
        found = account(modulation)
        for value in (found.plans, found.torch_weights, found.modulation_weights, found.passing):
            assert value in stated, f"{value:,} is not in docs/memory.md"
        for value in (found.resident, found.tabled, found.offloaded, found.smallest):
            assert value in stated, f"{value:,} is not in docs/memory.md"
