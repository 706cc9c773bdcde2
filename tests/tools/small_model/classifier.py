"""A classifier of handwritten digits, whose hidden layer is what pictures are compared by."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier
from torch import Tensor
from torch.nn import functional

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
        self._network.fit(classifier_inputs(ink), labels.numpy())

    def probabilities(self, ink: Tensor) -> Tensor:
        """Return the probability of each digit, ``[N, 10]``."""
        return torch.from_numpy(self._network.predict_proba(classifier_inputs(ink)))

    def features(self, ink: Tensor) -> Tensor:
        """Return the hidden layer, ``[N, 64]`` in fp64."""
        weight, bias = self._network.coefs_[0], self._network.intercepts_[0]
        return torch.from_numpy(
            np.maximum(classifier_inputs(ink) @ weight + bias, 0).astype(np.float64)
        )


def classifier_inputs(ink: Tensor) -> np.ndarray:
    """Return what classifiers look at of ink ``[N, 1, H, W]``: ``[N, 256]``."""
    return functional.adaptive_avg_pool2d(ink, FEATURE_SIZE).flatten(1).numpy()
