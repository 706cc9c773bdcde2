"""Ranges contain what was seen, and are wider where less is known."""

from __future__ import annotations

import pytest
from flux_fp4.trt_runtime.durations import (
    MACHINE_FACTOR,
    OTHER_SIZE_FACTOR,
    Estimate,
    build_work,
    estimate,
    total,
)
from flux_fp4.trt_runtime.run_history import Run
from flux_fp4.trt_runtime.spec import BuildSpec


def test_runs_of_the_same_size_are_preferred() -> None:
    found = estimate([Run(10, 100.0), Run(100, 2.0), Run(101, 2.02)], 100)
    assert found is not None
    assert found.low == pytest.approx(2 / MACHINE_FACTOR)
    assert found.high == pytest.approx(2 * MACHINE_FACTOR)


def test_other_sizes_are_scaled_and_less_certain() -> None:
    found = estimate([Run(10, 1.0)], 100)
    assert found is not None
    assert found.low == pytest.approx(10 / MACHINE_FACTOR / OTHER_SIZE_FACTOR)
    assert found.high == pytest.approx(10 * MACHINE_FACTOR * OTHER_SIZE_FACTOR)


def test_an_unsteady_machine_makes_the_range_wide() -> None:
    found = estimate([Run(1, seconds) for seconds in (1.0, 1.0, 2.0, 5.0, 5.0)], 1)
    assert (found.low, found.high) == (1.0, 5.0)


def test_without_runs_nothing_is_said() -> None:
    assert estimate([], 1) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ((0.2, 0.4), "about 0 to 1 s"),
        ((40, 80), "about 40 to 80 s"),
        ((80, 200), "about 1 to 3 min"),
        ((720, 1500), "about 12 to 25 min"),
        ((5400, 9000), "about 1.5 to 2.5 h"),
    ],
)
def test_text(seconds: tuple[float, float], text: str) -> None:
    assert str(Estimate(*seconds)) == text


def test_sums() -> None:
    assert total([Estimate(1, 2).times(3), Estimate(4, 5)]) == Estimate(7, 11)


def test_what_changes_the_cost_of_a_plan_changes_its_name() -> None:
    plain = ("double_blocks.0", True, False, True, BuildSpec())
    names = {
        build_work(*plain),
        build_work("single_blocks.0", *plain[1:]),
        build_work(plain[0], False, True, *plain[3:]),
        build_work(*plain[:3], False, plain[4]),
        build_work(*plain[:4], BuildSpec(targets=("sm120", "sm121"))),
    }
    assert len(names) == 5
    assert build_work("double_blocks.7", *plain[1:]) == build_work(*plain)
