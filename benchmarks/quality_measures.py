"""What the quality table measures of a model, and how sure it is of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from flux_fp4.quant.flux.model import Flux
from flux_fp4.quant.quality.distributions import frechet_distance
from flux_fp4.quant.sqnr import SQNR
from quality_rows import Made
from scipy import stats
from sklearn.metrics.pairwise import polynomial_kernel
from small_model.classifier import DigitClassifier
from small_model.digits import PROMPTS, ink_of
from small_model.samples import TIMESTEPS, Digits
from small_model.sampling import Decoder, sample, velocity
from torch import Tensor
from torch.nn import functional

HELD_OUT = range(1537, 1793)
"""Pictures that no recipe sees, for the velocity. The transformer was trained on them too."""

SEEDS = (4321, 4322)
PER_PROMPT = 100
"""Pictures by seed."""

PARTS = 20
"""Equal parts of the pictures, every prompt in each, whose spread gives the intervals."""


@dataclass(frozen=True)
class Result:
    """What was measured of one model.

    Attributes:
        velocity_db: SQNR of the velocity on held-out pictures; infinite for the original.
        loss: Mean squared error of the velocity against that of the flow, on the same pictures.
        plan_bytes: See ``Made``.
        extra_operations: As above.
        seconds: As above.
        features: ``[N, 64]`` of the drawn pictures, the classifier's.
        probabilities: ``[N]``: that the classifier gives the digit of each picture's prompt.
        read: ``[N]`` bool: whether it reads the picture as that digit.
    """

    velocity_db: float
    loss: float
    plan_bytes: int
    extra_operations: float
    seconds: float
    features: np.ndarray
    probabilities: np.ndarray
    read: np.ndarray

    def save(self, path: Path) -> None:
        """Write it as one file."""
        np.savez(path, **asdict(self))

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            values = {field.name: stored[field.name] for field in fields(cls)}
        return cls(**{k: v if v.ndim else v.item() for k, v in values.items()})


class Gauge:
    """The original, its data and a classifier, to measure models by."""

    def __init__(self, original: Flux, autoencoder: Path, digits: Digits) -> None:
        self.digits, self._original = digits, original
        self._decoder = Decoder(autoencoder)
        self._classifier = DigitClassifier(digits.ink, digits.labels)

    def real_features(self) -> Tensor:
        """Return the features ``[N, 64]`` of real digits."""
        return self._classifier.features(self.digits.ink)

    def result(self, made: Made) -> Result:
        """Measure a model."""
        db, loss = self._velocity(made.model)
        labels = torch.arange(len(PROMPTS)).repeat_interleave(PER_PROMPT)
        inks = [self._ink(made.model, labels, seed) for seed in SEEDS]
        ink, labels = torch.cat(inks), labels.repeat(len(SEEDS))
        probabilities = self._classifier.probabilities(ink)
        return Result(
            velocity_db=db,
            loss=loss,
            plan_bytes=made.plan_bytes,
            extra_operations=made.extra_operations,
            seconds=made.seconds,
            features=self._classifier.features(ink).numpy(),
            probabilities=probabilities[range(len(labels)), labels].numpy(),
            read=(probabilities.argmax(1) == labels).numpy(),
        )

    def _velocity(self, model: Flux) -> tuple[float, float]:
        generator, ratio, loss = torch.Generator().manual_seed(99), SQNR(), 0.0
        chosen = torch.tensor(HELD_OUT)
        for level in range(TIMESTEPS):
            x0 = self.digits.latents[chosen]
            noise = torch.randn(x0.shape, generator=generator)
            t = torch.full((len(chosen),), (level + 0.5) / TIMESTEPS)
            x = torch.lerp(x0, noise, t[:, None, None, None])
            expected = velocity(self._original, x, t, self.digits.labels[chosen], self.digits)
            actual = velocity(model, x, t, self.digits.labels[chosen], self.digits)
            ratio.add(expected, actual)
            loss += functional.mse_loss(actual, noise - x0).item() / TIMESTEPS
        return ratio.db, loss

    def _ink(self, model: Flux, labels: Tensor, seed: int) -> Tensor:
        latents = sample(model, labels, seed, self.digits)
        return ink_of(torch.stack(list(self._decoder.pictures(latents))))


Statistic = Callable[[Sequence[Result], np.ndarray], float]
"""From results and numbers of pictures to a value."""


def frechet(real: Tensor) -> Statistic:
    """Return FID of the first result's pictures against real ones."""
    return lambda results, chosen: frechet_distance(real, _features(results[0], chosen)).value


def kernel(real: Tensor) -> Statistic:
    """Return KID times 1,000 of the first result's pictures against real ones.

    Over all pictures at once, where torchmetrics averages over subsets: without chance, and fast
    enough for intervals.
    """
    originals = real.numpy()
    within = _mean_of_pairs(originals)

    def distance(results: Sequence[Result], chosen: np.ndarray) -> float:
        drawn = results[0].features[chosen]
        across = _cubic(originals, drawn).mean()
        return 1000 * float(within + _mean_of_pairs(drawn) - 2 * across)

    return distance


def confidence(results: Sequence[Result], chosen: np.ndarray) -> float:
    """Return how sure the classifier is of the first result's pictures."""
    return float(results[0].probabilities[chosen].mean())


def closed(measure: Statistic) -> Statistic:
    """Return which part of the gap between the second result and the third the first one closes."""

    def part(results: Sequence[Result], chosen: np.ndarray) -> float:
        mine, worst, best = (measure([result], chosen) for result in results)
        return (worst - mine) / (worst - best)

    return part


def with_interval(measure: Statistic, results: Sequence[Result]) -> tuple[float, float]:
    """Return a value and half of its 95 % interval, by a jackknife that leaves out part after part.

    Equal noise in all results makes it paired. (Efron & Tibshirani 1993, An Introduction to the
    Bootstrap, eq. 11.5, with groups of pictures in place of single ones.)
    """
    numbers = np.arange(len(results[0].read))
    parts = [numbers % PARTS == part for part in range(PARTS)]
    without = np.array([measure(results, numbers[~part]) for part in parts])
    spread = (PARTS - 1) / PARTS * np.square(without - without.mean()).sum()
    half = stats.t.ppf(0.975, PARTS - 1) * math.sqrt(spread)
    return measure(results, numbers), float(half)


def _cubic(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """KID's kernel (Binkowski et al. 2018, arXiv:1801.01401, section 4)."""
    values: np.ndarray = polynomial_kernel(first, second, degree=3, coef0=1)
    return values


def _mean_of_pairs(rows: np.ndarray) -> float:
    """Mean kernel of different rows: what makes the estimate unbiased."""
    values = _cubic(rows, rows)
    return float((values.sum() - values.trace()) / (len(rows) * (len(rows) - 1)))


def _features(result: Result, chosen: np.ndarray) -> Tensor:
    return torch.from_numpy(result.features[chosen])
