from __future__ import annotations

import pytest
import torch
from flux_fp4.trt_runtime.adapters import FactorStore, LowRank, factor_inputs, factor_shapes
from flux_fp4.trt_runtime.contract import TensorSpec
from flux_fp4.trt_runtime.errors.run import AdapterError

SPECS = (
    TensorSpec("x", "bf16", ("B", "S", 24)),
    TensorSpec("linear1.lora_down", "bf16", (24, "R_linear1", 16)),
    TensorSpec("linear1.lora_up", "bf16", ("R_linear1", 16, 40)),
    TensorSpec("linear2.lora_down", "bf16", (32, "R_linear2", 16)),
    TensorSpec("linear2.lora_up", "bf16", ("R_linear2", 16, 24)),
)


def factors(width: int = 24, rank: int = 5, outputs: int = 40) -> LowRank:
    generator = torch.Generator().manual_seed(rank)
    return LowRank(
        torch.randn(width, rank, generator=generator),
        torch.randn(rank, outputs, generator=generator),
    )


def test_shapes_come_from_the_inputs() -> None:
    assert factor_shapes(SPECS) == {"linear1": (24, 40), "linear2": (32, 24)}


@pytest.mark.parametrize("rank", [1, 5, 16, 17, 512])
def test_padding_does_not_change_the_product(rank: int) -> None:
    adapter = factors(rank=rank)
    inputs = factor_inputs("single_blocks.0", SPECS, {"linear1": adapter})
    down, up = inputs["linear1.lora_down"], inputs["linear1.lora_up"]
    tiles = (rank + 15) // 16
    assert (down.shape, up.shape) == ((24, tiles, 16), (tiles, 16, 40))
    down, up = down.flatten(1), up.flatten(0, 1)
    assert torch.equal(down[:, :rank], adapter.down)
    assert torch.equal(up[:rank], adapter.up)
    assert not down[:, rank:].any()
    assert not up[rank:].any()


def test_linear_without_adapter_gets_zeros() -> None:
    inputs = factor_inputs("single_blocks.0", SPECS, {"linear1": factors()})
    assert inputs.keys() == {spec.name for spec in SPECS if spec.name != "x"}
    assert inputs["linear2.lora_down"].shape == (32, 1, 16)
    assert inputs["linear2.lora_up"].shape == (1, 16, 24)
    assert not inputs["linear2.lora_down"].any()
    assert not inputs["linear2.lora_up"].any()


@pytest.mark.parametrize(
    ("linear", "adapter", "problem"),
    [
        ("linear3", factors(), "no such Linear"),
        ("linear1", factors(width=32), r"\[32, 5\] and \[5, 40\] do not fit 24 to 40"),
        ("linear1", factors(outputs=24), "do not fit 24 to 40"),
        ("linear1", LowRank(torch.ones(24, 3), torch.ones(4, 40)), "do not fit"),
        ("linear1", factors(rank=513), "rank 513 is not within 1 to 512"),
        ("linear1", LowRank(torch.ones(24, 0), torch.ones(0, 40)), "rank 0"),
    ],
)
def test_factors_that_do_not_fit_are_refused(linear: str, adapter: LowRank, problem: str) -> None:
    with pytest.raises(AdapterError, match=problem) as caught:
        factor_inputs("single_blocks.0", SPECS, {linear: adapter})
    assert (caught.value.block, caught.value.linear) == ("single_blocks.0", linear)


def test_store_keeps_factors_while_nothing_is_placed() -> None:
    store = FactorStore()
    given = {"single_blocks.0": {"linear1.lora_down": torch.ones(24, 1, 16)}}
    store.replace(given, torch.bfloat16)
    assert store.bytes == 24 * 16 * 2
    assert store.inputs_of("single_blocks.0") == {}
    for _ in range(2):
        store.place(torch.device("cpu"))
        placed = store.inputs_of("single_blocks.0")["linear1.lora_down"]
        assert placed.dtype == torch.bfloat16
        store.release()
        assert store.inputs_of("single_blocks.0") == {}
    store.replace({}, torch.bfloat16)
    assert (store.bytes, list(store.blocks)) == (0, [])
