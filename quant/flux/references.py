"""Where reference latents (FLUX.1 Kontext, FLUX.2) stand among the positions of image tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import FluxConfig
from .model import image_ids

REFERENCE_METHODS = ("offset", "index", "uxo")
"""Methods of ComfyUI 0.30's ``Flux._forward`` that differ in positions only. Its fourth,
``index_timestep_zero``, also modulates reference tokens as if at time zero."""


def image_and_reference_ids(
    size: tuple[int, int],
    references: Sequence[tuple[int, int]],
    method: str,
    config: FluxConfig,
) -> Tensor:
    """Return the positions of a latent's tokens, followed by those of its reference latents.

    Args:
        size: Height and width of the latent.
        references: Height and width of each reference latent.
        method: One of ``REFERENCE_METHODS``.
        config: The model's sizes.

    Returns:
        ``[1, N, axes]``, the tokens of ``references`` included in N.
    """
    patch, axes = config.patch_size, len(config.axes_dim)
    origins = _origins(size, references, method, config)
    places = zip((size, *references), ((0.0, 0, 0), *origins), strict=True)
    ids = [image_ids(*extent, 1, patch, axes, origin) for extent, origin in places]
    return torch.cat(ids, dim=1)


def _origins(
    size: tuple[int, int],
    references: Sequence[tuple[int, int]],
    method: str,
    config: FluxConfig,
) -> list[tuple[float, int, int]]:
    patch = config.patch_size
    if method == "index":
        step = config.ref_index_scale
        return [(step * count, 0, 0) for count in range(1, len(references) + 1)]
    used_height = used_width = 0
    origins: list[tuple[float, int, int]] = []
    for height, width in references:
        if method == "uxo":  # along the diagonal, behind the latent
            index = 0.0
            row = -(-size[0] // patch) * patch + used_height
            column = -(-size[1] // patch) * patch + used_width
            used_height, used_width = used_height + height, used_width + width
        else:  # on a plane of their own, the next one where that grows least
            index = 1.0
            beside = height + used_height > width + used_width
            row, column = (0, used_width) if beside else (used_height, 0)
            used_height = max(used_height, height + row)
            used_width = max(used_width, width + column)
        origins.append((index, _tokens(row, patch), _tokens(column, patch)))
    return origins


def _tokens(latent_pixels: int, patch: int) -> int:
    return (latent_pixels + patch // 2) // patch
