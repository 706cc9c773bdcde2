"""Calibration samples on the rectified-flow path, and the state that carries them down the stack.

FLUX is a rectified flow: ``x_t = (1 - t) * x0 + t * noise`` with ``x0`` the latent of an image is
distributed as the sampler's own latents at noise level ``t`` (Liu et al. 2022, arXiv:2209.03003).
So activation ranges can be measured without sampling: noise some latents, embed them once, and
push them through the blocks one block at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from blake3 import blake3
from torch import Tensor

from .errors.calibration import CalibrationError, NotFiniteError
from .flux.config import FluxConfig
from .flux.layers import rope_cos_sin
from .flux.model import Embedders, patchify, text_ids
from .flux.references import REFERENCE_METHODS, image_and_reference_ids


@dataclass(frozen=True)
class Conditioning:
    """What guides the sampler besides noise: one prompt, and latents that come with it.

    Attributes:
        context: Text states ``[1, T, context_in_dim]``.
        pooled: Pooled text ``[1, vec_in_dim]``; None stands for zeros, as in ComfyUI.
        guidance: Distilled guidance scale; None leaves the guidance embedding out.
        concat: Channels that join those of the latent, ``[n, E, h, w]`` in the latent's size, for
            Fill (16 of the picture, 64 of the mask) and for Canny and Depth (16): row ``i``
            belongs to picture ``i``, repeating.
        references: Reference latents in model space, each ``[n, C, h, w]`` in any size; rows as in
            ``concat``.
        reference_method: How references are placed, one of ``REFERENCE_METHODS``; None leaves it
            to the model.
    """

    context: Tensor
    pooled: Tensor | None
    guidance: float | None
    concat: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    reference_method: str | None = None


@dataclass(frozen=True)
class CalibrationSample:
    """One noised latent with its conditioning.

    Attributes:
        latent: ``x_t``, fp32 ``[1, C, h, w]``.
        t: Time in (0, 1); 1 is pure noise.
        conditioning: Its tensors have one row.
        velocity: ``noise - x0``, fp32 ``[1, C, h, w]``: what the model is trained to predict.
    """

    latent: Tensor
    t: float
    conditioning: Conditioning
    velocity: Tensor

    def velocity_patches(self, patch_size: int) -> Tensor:
        """Return ``velocity`` as the model predicts it: ``[1, N, patch_size**2 * C]``."""
        return patchify(self.velocity, patch_size)


@dataclass(frozen=True)
class CalibrationSet:
    """Samples to calibrate a model with.

    Attributes:
        samples: The samples.
        seed: Of their noise.
        timesteps: Noise levels for each pair of latent and prompt.
    """

    samples: tuple[CalibrationSample, ...]
    seed: int
    timesteps: int

    def digest(self) -> str:
        """Return a blake3 digest of every value that calibration can see."""
        digest = blake3()
        for sample in self.samples:
            condition = sample.conditioning
            numbers = (sample.t, condition.guidance, condition.reference_method)
            digest.update(repr((*numbers, len(condition.references))).encode())
            digest_tensors(digest, (sample.latent, sample.velocity))
            digest_conditioning(digest, condition)
        return digest.hexdigest()


def digest_conditioning(digest: blake3, condition: Conditioning) -> None:
    """Add every tensor of a conditioning to a digest."""
    digest_tensors(digest, _tensors(condition).values())


def digest_tensors(digest: blake3, tensors: Iterable[Tensor | None]) -> None:
    """Add shapes and fp32 values of tensors, or that there is none, to a digest."""
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())


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
        picture = index % len(latents)
        x0 = latents[picture][None]
        condition = _for_picture(conditioning[index % len(conditioning)], picture)
        _check_finite(x0, condition, index)
        for level in range(timesteps):
            t = (level + 0.5) / timesteps
            noise = torch.randn(x0.shape, generator=generator)
            x_t = (1 - t) * x0 + t * noise
            samples.append(CalibrationSample(x_t, t, condition, noise - x0))
    return CalibrationSet(tuple(samples), seed, timesteps)


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
        CalibrationError: Channels, text width or references are not the model's.
    """
    weight = embedders.img_in.weight
    return [_embedded(sample, embedders, config, weight) for sample in calibration.samples]


def _embedded(
    sample: CalibrationSample, embedders: Embedders, config: FluxConfig, like: Tensor
) -> SampleState:
    _check_fits(sample, config)
    condition = sample.conditioning
    pooled = condition.pooled
    if config.vec_in_dim is None:
        pooled = None
    elif pooled is None:
        pooled = torch.zeros(1, config.vec_in_dim)
    guidance = condition.guidance
    img, txt, vec = embedders.embed(
        _patches(sample, config).to(like),
        condition.context.to(like),
        torch.tensor([sample.t], device=like.device),
        None if pooled is None else pooled[:, : config.vec_in_dim].to(like),
        None if guidance is None else torch.tensor([guidance], device=like.device).to(like),
    )
    ids = torch.cat((text_ids(txt.shape[1], config), _image_ids(sample, config)), dim=1)
    cos, sin = rope_cos_sin(ids.to(like.device), config.axes_dim, config.theta)
    return SampleState(img, txt, vec, cos, sin, embedders.shared_modulation(vec))


def _patches(sample: CalibrationSample, config: FluxConfig) -> Tensor:
    condition, latent = sample.conditioning, sample.latent
    if condition.concat is not None:
        latent = torch.cat((latent, condition.concat.to(latent)), dim=1)
    sequence = (latent, *(reference.to(latent) for reference in condition.references))
    return torch.cat([patchify(part, config.patch_size) for part in sequence], dim=1)


def _image_ids(sample: CalibrationSample, config: FluxConfig) -> Tensor:
    size, *references = (
        (latent.shape[-2], latent.shape[-1])
        for latent in (sample.latent, *sample.conditioning.references)
    )
    method = sample.conditioning.reference_method or config.default_ref_method
    return image_and_reference_ids(size, references, method, config)


def _check_fits(sample: CalibrationSample, config: FluxConfig) -> None:
    condition = sample.conditioning
    context, pooled = condition.context, condition.pooled
    _check_channels(sample, config)
    if context.shape[-1] != config.context_in_dim:
        raise CalibrationError(
            f"text states are {context.shape[-1]} wide", f"it takes {config.context_in_dim}"
        )
    if config.vec_in_dim and pooled is not None and pooled.shape[-1] < config.vec_in_dim:
        raise CalibrationError(
            f"pooled text is {pooled.shape[-1]} wide", f"it takes {config.vec_in_dim}"
        )
    method = condition.reference_method
    if method is not None and method not in REFERENCE_METHODS:
        raise CalibrationError(
            f"the reference latent method is '{method}'",
            f"engines take {', '.join(REFERENCE_METHODS)}; choose one of these in "
            "'Edit Model Reference Method'",
        )


_CONCAT_NODES = {
    "flux1-control": "'InstructPixToPixConditioning'",
    "flux1-fill": "'InpaintModelConditioning'",
}
"""ComfyUI's nodes that add the channels which a variant takes besides the latent."""


def _check_channels(sample: CalibrationSample, config: FluxConfig) -> None:
    concat = sample.conditioning.concat
    found = sample.latent.shape[1]
    extra = 0 if concat is None else concat.shape[1]
    if found != config.out_channels:
        raise CalibrationError(
            f"latents have {found} channels",
            f"'{config.variant}' takes {config.out_channels}; encode the pictures with its own VAE",
        )
    if found + extra != config.in_channels:
        needed = config.in_channels - config.out_channels
        node = _CONCAT_NODES.get(config.variant)
        advice = f"connect {node}" if node else "connect conditioning without inpainting or control"
        raise CalibrationError(
            f"the conditioning adds {extra} channels to the latent's {found}",
            f"'{config.variant}' takes {needed} more; {advice}",
        )
    for reference in sample.conditioning.references:
        if config.in_channels != config.out_channels or reference.shape[1] != found:
            raise CalibrationError(
                f"a reference latent has {reference.shape[1]} channels",
                f"img_in of '{config.variant}' takes {config.in_channels} of every token",
            )


def _for_picture(condition: Conditioning, picture: int) -> Conditioning:
    def row(tensor: Tensor) -> Tensor:
        return tensor[picture % len(tensor)][None].detach().float().cpu()

    return replace(
        condition,
        concat=None if condition.concat is None else row(condition.concat),
        references=tuple(map(row, condition.references)),
    )


def _tensors(condition: Conditioning) -> dict[str, Tensor | None]:
    references = {
        f"reference latent {index}": latent for index, latent in enumerate(condition.references)
    }
    return {
        "text": condition.context,
        "pooled text": condition.pooled,
        "image or mask to join": condition.concat,
        **references,
    }


def _check_finite(latent: Tensor, condition: Conditioning, index: int) -> None:
    for name, tensor in {"latent": latent, **_tensors(condition)}.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise NotFiniteError(
                f"The {name} of calibration sample {index}", "Look at it with 'VAE Decode'."
            )
