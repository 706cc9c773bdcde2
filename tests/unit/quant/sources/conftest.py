from __future__ import annotations

import pytest
import torch
from tiny_flux import random_flux

State = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def state() -> State:
    """The tiny FLUX.1 in bf16, by BFL's names."""
    return {name: value.bfloat16() for name, value in random_flux().state_dict().items()}
