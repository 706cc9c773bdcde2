"""Is a difference between two models real, and how many prompts would show it.

Both models draw the same prompts from the same seeds, so every picture has a partner and only the
differences within pairs count: most of the spread between prompts cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from ..errors.quality import PicturesError

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
POWER = 0.8
"""The customary values (Cohen 1988, Statistical Power Analysis for the Behavioral Sciences)."""

_RESAMPLES = 9999
_SEED = 0
"""The same values give the same interval every time."""


class PairedDifference(BaseModel):
    """What paired values say about ``second - first``.

    Attributes:
        count: Pairs.
        first_mean: Of the first member of each pair.
        second_mean: Of the second.
        difference: Mean of ``second - first``.
        deviation: Standard deviation of ``second - first`` over the pairs.
        t_interval: Confidence interval of the mean difference, after Student.
        bootstrap_interval: The same by resampling pairs, bias-corrected and accelerated (Efron
            1987): it does not assume that differences are normally distributed.
        p_value: Two-sided, of a paired t-test against no difference.
        effect_size: Difference in units of its deviation, Cohen's d_z; infinite if all pairs
            differ by the same.
        detectable: The smallest true difference that so many pairs show with that power.
        prompts_needed: Pairs that show a difference of this size with the customary power; None
            where there is none.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    count: int
    first_mean: float
    second_mean: float
    difference: float
    deviation: float
    t_interval: tuple[float, float]
    bootstrap_interval: tuple[float, float]
    p_value: float
    effect_size: float
    detectable: float
    prompts_needed: int | None


class MeanValue(BaseModel):
    """A mean and Student's confidence interval of it; None for a single value."""

    model_config = ConfigDict(frozen=True)

    mean: float
    interval: tuple[float, float] | None


def mean_value(values: Sequence[float]) -> MeanValue:
    """Return the mean of at least one value and how sure it is."""
    found = np.asarray(values, np.float64)
    mean = float(found.mean())
    if found.size < 2:
        return MeanValue(mean=mean, interval=None)
    error = float(found.std(ddof=1)) / math.sqrt(found.size)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, found.size - 1)) * error
    return MeanValue(mean=mean, interval=(mean - half, mean + half))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> PairedDifference:
    """Compare paired values.

    Raises:
        PicturesError: There are fewer than two pairs, or as many values as do not pair up.
    """
    before, after = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if before.shape != after.shape or before.size < 2:
        raise PicturesError(
            f"{before.size} and {after.size} values cannot be compared in pairs",
            "at least two pairs are needed for an interval",
            "Draw the same prompts and seeds with both models.",
        )
    differences = after - before
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
    if deviation == 0:
        # neither test is defined: there is nothing left to chance
        return _without_spread(before, after, mean)
    error = deviation / math.sqrt(differences.size)
    low, high = stats.t.interval(CONFIDENCE, differences.size - 1, loc=mean, scale=error)
    return PairedDifference(
        count=differences.size,
        first_mean=float(before.mean()),
        second_mean=float(after.mean()),
        difference=mean,
        deviation=deviation,
        t_interval=(float(low), float(high)),
        bootstrap_interval=_bootstrap_interval(differences),
        p_value=float(stats.ttest_1samp(differences, 0).pvalue),
        effect_size=mean / deviation,
        detectable=detectable_difference(differences.size, deviation),
        prompts_needed=prompts_needed(mean, deviation) if mean else None,
    )


def power(count: int, difference: float, deviation: float) -> float:
    """Return how likely a paired t-test of that many prompts shows a difference.

    The test statistic follows the noncentral t distribution with ``count - 1`` degrees of freedom
    and noncentrality ``sqrt(count) * difference / deviation`` (Cohen 1988, chapter 2).

    Args:
        count: Pairs, at least 2.
        difference: The true mean difference.
        deviation: Standard deviation of the differences, above 0.
    """
    freedom = count - 1
    critical = stats.t.ppf(1 - SIGNIFICANCE / 2, freedom)
    shift = math.sqrt(count) * abs(difference) / deviation
    return float(stats.nct.sf(critical, freedom, shift) + stats.nct.cdf(-critical, freedom, shift))


def prompts_needed(difference: float, deviation: float) -> int:
    """Return the fewest prompts whose paired t-test has the customary power.

    Args:
        difference: The true mean difference, not 0.
        deviation: Standard deviation of the differences.
    """
    if deviation == 0:
        return 2
    quantiles = stats.norm.ppf(1 - SIGNIFICANCE / 2) + stats.norm.ppf(POWER)
    # The normal approximation is below the exact number, by about two prompts.
    count = max(2, math.floor((quantiles * deviation / abs(difference)) ** 2))
    if count > _EXACT_UP_TO:
        return count + 2
    while power(count, difference, deviation) < POWER:
        count += 1
    return count


_EXACT_UP_TO = 1_000_000
"""Above it the two distributions cannot be told apart, and scipy's noncentral t loses precision."""


def detectable_difference(count: int, deviation: float) -> float:
    """Return the smallest true difference that so many prompts show, by the normal approximation.

    Args:
        count: Pairs.
        deviation: Standard deviation of the differences.
    """
    quantiles = stats.norm.ppf(1 - SIGNIFICANCE / 2) + stats.norm.ppf(POWER)
    return float(quantiles * deviation / math.sqrt(count))


def _without_spread(before: np.ndarray, after: np.ndarray, difference: float) -> PairedDifference:
    return PairedDifference(
        count=before.size,
        first_mean=float(before.mean()),
        second_mean=float(after.mean()),
        difference=difference,
        deviation=0.0,
        t_interval=(difference, difference),
        bootstrap_interval=(difference, difference),
        p_value=0.0 if difference else 1.0,
        effect_size=math.copysign(math.inf, difference) if difference else 0.0,
        detectable=0.0,
        prompts_needed=2 if difference else None,
    )


def _bootstrap_interval(differences: np.ndarray) -> tuple[float, float]:
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        batch=max(1, 10_000_000 // differences.size),
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(found.low), float(found.high)
