"""Pictures and velocities of the small model in torch, with blocks that round as a plan does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import comfy.model_sampling
import comfy.samplers
import comfy.utils
import torch
from comfy.taesd.taesd import TAESD
from flux_fp4.quant.emulation import emulated_block
from flux_fp4.quant.flux.model import Flux, image_ids, patchify, unpatchify
from flux_fp4.quant.modulation import is_modulation_weight, stored_modulation
from flux_fp4.quant.nvfp4 import quantize_weight
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.sources.source import FluxSource
from torch import Tensor

from .digits import IMAGE_SIZE
from .samples import GUIDANCE, Digits

TEXT_TOKENS = 8
"""Of the encoder's 77: a prompt takes six, the others repeat the end token. The model saw 8 in most
steps of its training, and a picture of 24 tokens takes a quarter of the time of one of 93."""

STEPS, SHIFT = 20, 1.15
"""As the shipped workflows: euler, simple, and the shift that ComfyUI gives FLUX by itself."""

AT_ONCE = 200
"""Pictures. More take longer each: every operation then gets new memory from the system."""

LATENT = (16, IMAGE_SIZE // 8, IMAGE_SIZE // 8)


def original_model(source: FluxSource) -> Flux:
    """Return the transformer in full precision, fp32."""
    model = Flux(source.config)
    state = source.tensors(model.state_dict())
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.requires_grad_(False).eval()


def quantized_model(source: FluxSource, checkpoint: QuantizedCheckpoint) -> Flux:
    """Return the transformer as an engine of a quantized checkpoint computes it."""
    model = original_model(source)
    for name, tensor in model.state_dict().items():
        stored = rounded_modulation(name, tensor, checkpoint.metadata.options.modulation)
        tensor.copy_(stored)
    for block in checkpoint.metadata.block_names:
        emulated = emulated_block(model.get_submodule(block), checkpoint.block_tensors(block))  # type: ignore[arg-type]
        model.set_submodule(block, emulated)
    return model


def rounded_modulation(name: str, weight: Tensor, storage: str) -> Tensor:
    """Return a weight as it acts when modulation is stored in a format."""
    if storage == "bf16" or not is_modulation_weight(name):
        return weight
    if storage == "nvfp4":
        return quantize_weight(weight, name).dequantize()
    parts = stored_modulation(name, weight, "fp8")
    return parts[name].float() * parts[f"{name.removesuffix('.weight')}.weight_scale"]


def velocity(model: Flux, x: Tensor, t: Tensor, labels: Tensor, digits: Digits) -> Tensor:
    """Predict the velocity of latents ``[B, 16, 8, 8]`` at times ``[B]``."""
    parts = (part.split(AT_ONCE) for part in (x, t, labels))
    return torch.cat([_velocity(model, *part, digits) for part in zip(*parts, strict=True)])


@torch.inference_mode()
def _velocity(model: Flux, x: Tensor, t: Tensor, labels: Tensor, digits: Digits) -> Tensor:
    count, size = len(x), (x.shape[-2], x.shape[-1])
    patches = model(
        patchify(x),
        image_ids(*size, batch=count),
        digits.context[labels, :TEXT_TOKENS],
        torch.zeros(count, TEXT_TOKENS, 3),
        t,
        digits.pooled[labels],
        torch.full((count,), GUIDANCE),
    )
    return unpatchify(patches, *size)


def sample(model: Flux, labels: Tensor, seed: int, digits: Digits) -> Tensor:
    """Sample one latent per label with Euler's method; equal seeds start from equal noise."""
    x = torch.randn(len(labels), *LATENT, generator=torch.Generator().manual_seed(seed))
    times = sampling_times()
    for t, after in itertools.pairwise(times):
        x = x + (after - t) * velocity(model, x, t.expand(len(x)), labels, digits)
    return x


def sampling_times() -> Tensor:
    """Return the noise levels of ComfyUI's scheduler "simple", from 1 to 0."""
    sampling = comfy.model_sampling.ModelSamplingFlux()
    sampling.set_parameters(shift=SHIFT)
    times: Tensor = comfy.samplers.simple_scheduler(sampling, STEPS)
    return times


class Decoder:
    """The small autoencoder's decoder."""

    def __init__(self, autoencoder: Path) -> None:
        self._model = TAESD(latent_channels=LATENT[0])
        self._model.load_state_dict(comfy.utils.load_torch_file(str(autoencoder)), strict=False)

    @torch.inference_mode()
    def pictures(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield pictures ``[3, 64, 64]`` in [0, 1] of the sampler's latents."""
        for chunk in latents.split(50):
            yield from (self._model.taesd_decoder(chunk)).clamp(0, 1)
