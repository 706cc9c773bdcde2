"""Batches: equal shapes, every sample, a function of the step."""

from __future__ import annotations

from collections import Counter

from flux_fp4.quant.training.batch_order import BatchOrder, padded_batches

SHAPES = {index: "wide" if index % 3 else "high" for index in range(2, 33)}


def test_an_epoch_has_every_sample_and_no_mixed_batch() -> None:
    order = BatchOrder(SHAPES, 4, seed=1)
    # 21 wide and 10 high samples
    batches = [order.batch(step) for step in range(6 + 3)]
    assert {len(batch) for batch in batches} == {4}
    assert all(len({SHAPES[index] for index in batch}) == 1 for batch in batches)
    counts = Counter(index for batch in batches for index in batch)
    assert counts.keys() == SHAPES.keys()
    assert counts.total() - len(counts) == 3 + 2


def test_steps_need_no_history() -> None:
    order = BatchOrder(SHAPES, 4, seed=1)
    in_order = [order.batch(step) for step in range(24)]
    assert [BatchOrder(SHAPES, 4, seed=1).batch(step) for step in (5, 23, 9)] == [
        in_order[step] for step in (5, 23, 9)
    ]
    assert in_order[:9] != in_order[9:18]
    assert in_order[0] != BatchOrder(SHAPES, 4, seed=2).batch(0)


def test_fewer_samples_than_a_batch_are_repeated() -> None:
    order = BatchOrder({3: "a", 7: "a"}, 5, seed=0)
    assert Counter(order.batch(0)).keys() == {3, 7}
    assert len(order.batch(0)) == 5


def test_padded_batches_count_every_sample_once() -> None:
    shapes = ["a", "b", "a", "a", "b", "a"]
    found = list(padded_batches(range(6), shapes, 3))
    assert all(len(indices) == len(counts) == 3 for indices, counts in found)
    counted = [i for indices, counts in found for i, c in zip(indices, counts, strict=True) if c]
    assert sorted(counted) == list(range(6))
    assert all(len({shapes[index] for index in indices}) == 1 for indices, _ in found)
