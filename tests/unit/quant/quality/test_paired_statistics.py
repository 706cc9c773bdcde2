"""Intervals cover the truth as often as they claim; sample sizes have the power they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flux_fp4.quant.errors.quality import PicturesError
from flux_fp4.quant.quality.paired_statistics import (
    detectable_difference,
    mean_value,
    paired_difference,
    power,
    prompts_needed,
)
from scipy import stats


def test_result_is_that_of_the_paired_t_test() -> None:
    generator = np.random.default_rng(1)
    first = generator.normal(1.1, 0.9, 200)
    second = first - 0.05 + generator.normal(0, 0.2, 200)
    found = paired_difference(first, second)
    expected = stats.ttest_rel(second, first)
    assert found.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert found.t_interval == pytest.approx((interval.low, interval.high))
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert found.effect_size == pytest.approx(found.difference / np.std(second - first, ddof=1))
    # what unpaired statistics would not have seen
    assert found.p_value < 0.01 < stats.ttest_ind(first, second).pvalue


def test_bootstrap_interval_covers_as_often_as_it_says() -> None:
    """The 95 % interval of skewed differences, whose mean is 1 by construction."""
    generator = np.random.default_rng(2)
    trials = 300
    covered = 0
    for _ in range(trials):
        differences = generator.exponential(1.0, 60)
        low, high = paired_difference(np.zeros(60), differences).bootstrap_interval
        covered += low <= 1.0 <= high
    # 3 standard errors around 95 %, and the slight undercoverage of BCa at 60 values
    assert 0.89 <= covered / trials <= 0.988


def test_same_values_give_the_same_interval() -> None:
    values = np.random.default_rng(3).normal(size=50)
    assert paired_difference(values, values**2) == paired_difference(values, values**2)


@pytest.mark.parametrize(("difference", "deviation"), [(0.5, 1.0), (0.2, 1.0), (0.023, 0.15)])
def test_needed_prompts_have_the_power(difference: float, deviation: float) -> None:
    count = prompts_needed(difference, deviation)
    assert power(count, difference, deviation) >= 0.8 > power(count - 1, difference, deviation)
    generator = np.random.default_rng(4)
    samples = generator.normal(difference, deviation, (4000, count))
    shown = stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
    assert shown.mean() == pytest.approx(0.8, abs=3 * math.sqrt(0.8 * 0.2 / 4000))


def test_needed_prompts_equal_published_tables() -> None:
    """Paired t-test, two-sided 5 %, power 80 %: d = 0.2, 0.5, 0.8 (Cohen 1988; G*Power 3.1)."""
    assert [prompts_needed(d, 1.0) for d in (0.2, 0.5, 0.8)] == [199, 34, 15]
    assert prompts_needed(-0.5, 1.0) == 34


def test_detectable_difference_is_the_reverse() -> None:
    count = prompts_needed(0.023, 0.3)
    assert detectable_difference(count, 0.3) == pytest.approx(0.023, rel=1e-2)
    values = np.random.default_rng(5).normal(size=40)
    found = paired_difference(np.zeros(40), values)
    assert found.detectable == detectable_difference(40, found.deviation)


def test_huge_number_of_prompts_is_the_normal_approximation() -> None:
    assert prompts_needed(1e-3, 1.0) == pytest.approx(7.8489e6, rel=1e-4)


def test_no_spread_is_no_chance() -> None:
    same = paired_difference([1.0, 2.0], [1.0, 2.0])
    assert (same.p_value, same.effect_size, same.prompts_needed) == (1.0, 0.0, None)
    shifted = paired_difference([1.0, 2.0], [1.5, 2.5])
    assert (shifted.p_value, shifted.effect_size, shifted.prompts_needed) == (0.0, math.inf, 2)
    assert shifted.t_interval == (0.5, 0.5)


@pytest.mark.parametrize(("first", "second"), [([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_values_without_partners_are_refused(first: list[float], second: list[float]) -> None:
    with pytest.raises(PicturesError, match="in pairs"):
        paired_difference(first, second)


def test_mean_has_students_interval() -> None:
    found = mean_value([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    expected = stats.ttest_1samp([1.0, 2.0, 4.0], 0).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert mean_value([3.0]).interval is None
