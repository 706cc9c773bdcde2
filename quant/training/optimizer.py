"""How trained parameters are optimized: their learning rates, Adam's memory, the schedule."""

from __future__ import annotations

import math

from torch import nn

from ..recipe import TrainingOptions
from .trainable import TrainableNVFP4Linear

WARMUP = 0.05
"""Part of the steps in which the learning rate grows from zero."""

BETAS = (0.9, 0.99)
"""Of Adam. Runs are some hundred steps long: the average of squares over 1,000 of the default
0.999 would hardly have begun."""


def parameter_groups(student: nn.Module, options: TrainingOptions) -> list[dict[str, object]]:
    """Give each parameter the learning rate of its unit: see ``TrainingOptions``."""
    groups: list[dict[str, object]] = []
    for module in student.modules():
        if not isinstance(module, TrainableNVFP4Linear):
            continue
        groups.append({"params": [module.steps], "lr": options.learning_rate})
        groups.append({"params": [module.gain], "lr": options.relative_learning_rate})
        for parameter in (module.bias, module.svd_down, module.svd_up):
            if parameter is not None:
                size = parameter.detach().square().mean().sqrt().item()
                rate = options.relative_learning_rate * size
                groups.append({"params": [parameter], "lr": rate})
    return groups


def rate(step: int, steps: int) -> float:
    """Return the part of the learning rate in use: a short rise, then half a cosine to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
