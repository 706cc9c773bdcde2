"""The original's predictions, with one of its blocks in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..calibration import CalibrationSample, CalibrationSet
from ..flux.model import unpatchify
from ..sources.source import FluxSource
from ..stack import block_with_weights, embed, last_layer, run_block, tokens
from .block_training import BATCH_TOKENS
from .states import batched, batches


@torch.no_grad()
def teacher_velocities(
    source: FluxSource,
    samples: Sequence[CalibrationSample],
    device: str,
    dtype: torch.dtype,
    heartbeat: Callable[[], None],
) -> list[Tensor]:
    """Predict the velocity of some samples; what they say of theirs is ignored.

    Args:
        source: The original.
        samples: Latents, times and conditioning.
        device: Where to compute.
        dtype: Type to compute in.
        heartbeat: Called before each block; may raise to cancel.

    Returns:
        fp32 ``[1, C, h, w]`` each, on the CPU.
    """
    states = embed(source, CalibrationSet(tuple(samples), seed=0, timesteps=1), device, dtype)
    # samples of equal shapes side by side
    order = sorted(range(len(states)), key=lambda index: tokens(states[index]).shape[1])
    groups = batches(states, order, BATCH_TOKENS)
    joined = [batched([states[index] for index in group]) for group in groups]
    for name in source.config.block_names:
        heartbeat()
        block = block_with_weights(name, source.config, source.submodule(name, device), dtype)
        joined = [run_block(block, state) for state in joined]
    layer = last_layer(source, device, dtype)
    velocities: dict[int, Tensor] = {}
    for group, state in zip(groups, joined, strict=True):
        text = samples[group[0]].conditioning.context.shape[1]
        for row, index in enumerate(group):
            height, width = samples[index].latent.shape[-2:]
            patch = source.config.patch_size
            count = -(-height // patch) * -(-width // patch)
            image = state.img[row : row + 1, text : text + count]
            patches = layer(image, state.vec[row : row + 1]).float().cpu()
            velocities[index] = unpatchify(patches, height, width, patch)
    return [velocities[index] for index in range(len(samples))]
