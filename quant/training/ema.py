"""Exponential moving average of trained parameters, sharded as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class ExponentialAverage:
    """The average of parameters over the last steps: nearer to the optimum than any single step.

    Attributes:
        averages: By the parameters' names; without an average, the parameters themselves.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the parameters as they are.

        Args:
            model: Its parameters with gradients are averaged; sharded, if it will be.
            decay: Part of the average that one step keeps; 0 takes the last step alone.
        """
        self._model, self._decay = model, decay
        self._parameters = trained_parameters(model)
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().clone() if decay else parameter.detach()
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Count the parameters as they are after a step.

        Args:
            step: Steps before it. In the first ones the average forgets its start faster, as in
                TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``.
        """
        if not self._decay:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._parameters.items():
            _local(self.averages[name]).lerp_(_local(parameter), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model compute with the averages; they change places, so it takes no memory."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if not self._decay:
            return
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                # what is still gathered would be computed with instead
                module.reshard()
        for name, parameter in self._parameters.items():
            own, average = _local(parameter), _local(self.averages[name])
            held = own.clone()
            own.copy_(average)
            average.copy_(held)


def trained_parameters(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _local(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached
