"""Calibration samples on the rectified-flow path, and the state that carries them down the stack.

FLUX is a rectified flow: ``x_t = (1 - t) * x0 + t * noise`` with ``x0`` the latent of an image is
distributed as the sampler's own latents at noise level ``t`` (Liu et al. 2022, arXiv:2209.03003).
So activation ranges can be measured without sampling: noise some latents, embed them once, and
push them through the blocks one block at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from .errors import CalibrationError, NotFiniteError
from .flux.config import FluxConfig
from .flux.layers import rope_cos_sin
from .flux.model import Embedders, image_ids, patchify


@dataclass(frozen=True)
class Conditioning:
    """What the text encoders say about one prompt.

    Attributes:
        context: Text states ``[1, T, context_in_dim]``.
        pooled: Pooled text ``[1, vec_in_dim]``; None stands for zeros, as in ComfyUI.
        guidance: Distilled guidance scale; None leaves the guidance embedding out.
    """

    context: Tensor
    pooled: Tensor | None
    guidance: float | None


@dataclass(frozen=True)
class CalibrationSample:
    """One noised latent ``[1, C, h, w]`` at time ``t`` in (0, 1), with its conditioning."""

    latent: Tensor
    t: float
    conditioning: Conditioning


@dataclass(frozen=True)
class CalibrationSet:
    """Samples to calibrate a model with."""

    samples: tuple[CalibrationSample, ...]

    def digest(self) -> str:
        """Return a blake3 digest of every value that calibration can see."""
        digest = blake3()
        for sample in self.samples:
            conditioning = sample.conditioning
            digest.update(repr((sample.t, conditioning.guidance)).encode())
            for tensor in (sample.latent, conditioning.context, conditioning.pooled):
                if tensor is None:
                    digest.update(b"none")
                    continue
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def rectified_flow_samples(
    latents: Tensor, conditioning: Sequence[Conditioning], timesteps: int, seed: int
) -> CalibrationSet:
    """Noise latents to levels spread evenly over the sampler's path.

    Args:
        latents: Image latents ``x0`` in model space ``[n, C, h, w]``.
        conditioning: Prompts; latent ``i`` takes prompt ``i``, repeating the shorter of the two.
        timesteps: Noise levels for each pair: the midpoints of that many equal parts of (0, 1).
        seed: Of the noise. Every sample has noise of its own.

    Returns:
        ``max(n, len(conditioning)) * timesteps`` samples.

    Raises:
        CalibrationError: There are no latents, no prompts or no timesteps.
        NotFiniteError: A latent or a conditioning holds NaN or infinity.
    """
    if not len(latents) or not conditioning or timesteps < 1:
        found = f"{len(latents)} latents, {len(conditioning)} prompts, {timesteps} timesteps"
        raise CalibrationError(found, "at least one of each is needed")
    generator = torch.Generator().manual_seed(seed)
    latents = latents.detach().float().cpu()
    samples = []
    for index in range(max(len(latents), len(conditioning))):
        x0 = latents[index % len(latents)][None]
        condition = conditioning[index % len(conditioning)]
        _check_finite(x0, condition, index)
        for level in range(timesteps):
            t = (level + 0.5) / timesteps
            noise = torch.randn(x0.shape, generator=generator)
            samples.append(CalibrationSample((1 - t) * x0 + t * noise, t, condition))
    return CalibrationSet(tuple(samples))


@dataclass
class SampleState:
    """Activations of one sample between two blocks.

    Attributes:
        img: Image tokens ``[1, N, D]``; all tokens ``[1, T + N, D]`` from the first single block.
        txt: Text tokens ``[1, T, D]``; None from the first single block on.
        vec: Modulation input ``[1, D]``.
        cos: fp32 rotary cosines ``[1, T + N, head_dim / 2]``.
        sin: fp32 rotary sines.
        shared_mods: FLUX.2's modulation vectors ``[1, 15, D]``, see ``block_modulation``; None
            for FLUX.1.
    """

    img: Tensor
    txt: Tensor | None
    vec: Tensor
    cos: Tensor
    sin: Tensor
    shared_mods: Tensor | None = None


def embedded_samples(
    calibration: CalibrationSet, embedders: Embedders, config: FluxConfig
) -> list[SampleState]:
    """Embed every sample: the state before the first block.

    Args:
        calibration: The samples.
        embedders: The model's embedders, on the device and in the dtype to compute in.
        config: The model's sizes.

    Returns:
        One state per sample.

    Raises:
        CalibrationError: Channels or text width are not the model's.
    """
    weight = embedders.img_in.weight
    return [_embedded(sample, embedders, config, weight) for sample in calibration.samples]


def _embedded(
    sample: CalibrationSample, embedders: Embedders, config: FluxConfig, like: Tensor
) -> SampleState:
    _check_fits(sample, config)
    conditioning = sample.conditioning
    pooled = conditioning.pooled
    if pooled is None:
        pooled = torch.zeros(1, config.vec_in_dim)
    guidance = conditioning.guidance
    height, width = sample.latent.shape[-2:]
    ids = image_ids(height, width)
    ids = torch.cat((torch.zeros(1, conditioning.context.shape[1], 3), ids), dim=1).to(like.device)
    cos, sin = rope_cos_sin(ids, config.axes_dim, config.theta)
    img, txt, vec = embedders.embed(
        patchify(sample.latent).to(like),
        conditioning.context.to(like),
        torch.tensor([sample.t], device=like.device),
        pooled[:, : config.vec_in_dim].to(like),
        None if guidance is None else torch.tensor([guidance], device=like.device).to(like),
    )
    return SampleState(img, txt, vec, cos, sin)


def _check_fits(sample: CalibrationSample, config: FluxConfig) -> None:
    context, pooled = sample.conditioning.context, sample.conditioning.pooled
    if sample.latent.shape[1] != config.in_channels:
        raise CalibrationError(
            f"latents have {sample.latent.shape[1]} channels", f"it takes {config.in_channels}"
        )
    if context.shape[-1] != config.context_in_dim:
        raise CalibrationError(
            f"text states are {context.shape[-1]} wide", f"it takes {config.context_in_dim}"
        )
    if pooled is not None and pooled.shape[-1] < config.vec_in_dim:
        raise CalibrationError(
            f"pooled text is {pooled.shape[-1]} wide", f"it takes {config.vec_in_dim}"
        )


def _check_finite(latent: Tensor, conditioning: Conditioning, index: int) -> None:
    tensors = {"latent": latent, "text": conditioning.context, "pooled text": conditioning.pooled}
    for name, tensor in tensors.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise NotFiniteError(
                f"The {name} of calibration sample {index}", "Decode it and look at it."
            )
