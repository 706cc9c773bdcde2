"""A classifier of handwritten digits, whose hidden layer is what pictures are compared by."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.nn import functional

from .digits import ink_of

FEATURE_SIZE = 16
"""Ink is looked at in 16 x 16 parts: enough to tell digits apart."""

HIDDEN = 64


class DigitClassifier:
    """A network of one hidden layer, trained on real digits."""

    def __init__(self, ink: Tensor, labels: Tensor) -> None:
        """Train it on ink ``[N, 1, H, W]`` with labels ``[N]``; the same every time."""
        self._network = MLPClassifier(
            (HIDDEN,), early_stopping=True, max_iter=200, random_state=0, alpha=1e-3
        )
        self._network.fit(_inputs(ink), labels.numpy())

    @property
    def validation_accuracy(self) -> float:
        """Best share of held-back real digits that it read right while it was trained."""
        return float(self._network.best_validation_score_)

    def ink(self, pictures: Tensor) -> Tensor:
        """Return the ink ``[N, 1, H, W]`` of pictures ``[N, 3, H, W]`` in [0, 1]."""
        return ink_of(pictures)

    def probabilities(self, ink: Tensor) -> Tensor:
        """Return the probability of each digit, ``[N, 10]``."""
        return torch.from_numpy(self._network.predict_proba(_inputs(ink)))

    def features(self, ink: Tensor) -> Tensor:
        """Return the hidden layer, ``[N, 64]`` in fp64."""
        weight, bias = self._network.coefs_[0], self._network.intercepts_[0]
        return torch.from_numpy(np.maximum(_inputs(ink) @ weight + bias, 0).astype(np.float64))


def _inputs(ink: Tensor) -> np.ndarray:
    return functional.adaptive_avg_pool2d(ink, FEATURE_SIZE).flatten(1).numpy()
