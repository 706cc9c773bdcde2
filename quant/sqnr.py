"""Signal-to-quantization-noise ratio: the measure of every quantized tensor here."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class SQNR:
    """Accumulates signal and noise energy over tensors.

    ``10 * log10(sum(reference**2) / sum((actual - reference)**2))`` in dB; energies are summed in
    fp64, so the result does not depend on how the tensors are batched.

    Attributes:
        signal: Energy of the references so far.
        noise: Energy of the differences so far.
    """

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0

    def add(self, reference: Tensor, actual: Tensor) -> None:
        """Count a pair of equally shaped tensors."""
        reference = reference.double()
        signal = torch.sum(reference**2).item()
        self.add_energies(signal, torch.sum((actual.double() - reference) ** 2).item())

    def add_energies(self, signal: float, noise: float) -> None:
        """Count sums of squares."""
        self.signal += signal
        self.noise += noise

    @property
    def db(self) -> float:
        """The ratio in dB: infinite without noise, minus infinity with noise and no signal."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    """Return the SQNR in dB of one pair of tensors."""
    ratio = SQNR()
    ratio.add(reference, actual)
    return ratio.db
