"""The moving average of parameters."""

from __future__ import annotations

import pytest
import torch
from flux_fp4.quant.training.ema import ExponentialAverage
from torch import nn


@pytest.fixture
def model() -> nn.Module:
    model = nn.Linear(2, 1, bias=True)
    model.bias.requires_grad_(False)
    model.weight.data.fill_(0.0)
    return model


def test_average_follows_the_parameters(model: nn.Module) -> None:
    average = ExponentialAverage(model, 0.9)
    assert list(average.averages) == ["weight"]
    expected = 0.0
    for step in range(200):
        value = float(step % 7)
        model.weight.data.fill_(value)
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.averages["weight"], torch.full((1, 2), expected))


def test_averages_take_the_place_of_parameters_for_a_while(model: nn.Module) -> None:
    average = ExponentialAverage(model, 0.5)
    model.weight.data.fill_(8.0)
    parameter = model.weight
    with average.applied():
        assert model.weight is parameter
        assert model.weight.tolist() == [[0.0, 0.0]]
    assert model.weight.tolist() == [[8.0, 8.0]]
    assert average.averages["weight"].tolist() == [[0.0, 0.0]]


def test_without_decay_the_parameters_are_their_average(model: nn.Module) -> None:
    average = ExponentialAverage(model, 0)
    model.weight.data.fill_(8.0)
    average.update(0)
    with average.applied():
        assert model.weight.tolist() == average.averages["weight"].tolist() == [[8.0, 8.0]]
