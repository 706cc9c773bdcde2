"""Digests of ComfyUI's weight patches: what a merge depends on."""

from __future__ import annotations

from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor


def update_digest(digest: Any, value: Any) -> None:
    """Count a patch of any kind: numbers, names and every byte of its tensors.

    Args:
        digest: Takes bytes through ``update``.
        value: A patch or a part of one. Two functions are equal if their code and the values
            that they hold are.
    """
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(repr((tuple(value.shape), str(value.dtype))).encode())
        digest.update(data.numpy().tobytes())
    elif isinstance(value, (list, tuple)):
        for part in value:
            update_digest(digest, part)
    elif hasattr(value, "weights"):
        update_digest(digest, (type(value).__name__, value.weights))
    elif isinstance(value, FunctionType):
        digest.update(repr(value.__qualname__).encode() + value.__code__.co_code)
        consts = [const for const in value.__code__.co_consts if not isinstance(const, CodeType)]
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        update_digest(digest, (consts, cells, value.__defaults__))
    else:
        digest.update(repr(getattr(value, "__qualname__", value)).encode())
