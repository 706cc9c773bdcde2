"""Fit an autoencoder in the format of TAEF1, the tiny autoencoder for FLUX latents.

The encoder is written down instead of trained: its strided convolutions only move the pixels of
an 8x8 cell into channels, and its last convolution projects them on principal components. The
decoder has no such closed form (it upsamples by repetition) and is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from comfy.taesd.taesd import TAESD
from torch import Tensor, nn
from torch.nn import functional

from .digits import INK, PAPER, colour

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 16
CELL = 8

# ComfyUI's latent format Flux hands the sampler (latent - shift) * scale
# (comfy/latent_formats.py). With the same numbers in the file, the sampler works directly on the
# encoder's output, as VAELoader arranges for the published TAEF1.
VAE_SCALE = 0.3611
VAE_SHIFT = 0.1159

# Component k is scaled by its standard deviation to this power: 0 would give the last, hardly
# visible components the weight of the first, 1 would leave them to rounding and noise.
TEMPERING = 0.5

# Steps on 32x32 crops (the stack is convolutional and they cost a quarter), then on whole pictures.
CROP_STEPS = 500
PICTURE_STEPS = 80
CROP_CELLS = 4
BATCH = 8
LEARNING_RATE = 1.5e-3
# Sampled latents are not exactly those of a picture; the decoder must not mind.
LATENT_NOISE = 0.1


def latents_of(ink: Tensor) -> Tensor:
    """Encode the training ink ``[N, 1, H, W]`` to what the sampler sees, ``[N, 16, H/8, W/8]``."""
    projection, bias = _projection(ink)
    return torch.einsum("kc,nchw->nkhw", projection, _cells(ink)) + bias.view(-1, 1, 1)


def train_autoencoder(ink: Tensor, seed: int) -> TAESD:
    """Fit the encoder to ink ``[N, 1, H, W]`` in [0, 1] and train the decoder.

    Returns:
        The autoencoder; each channel of its encoder's output has mean 0 and variance 1.
    """
    torch.manual_seed(seed)
    model = TAESD(latent_channels=LATENT_CHANNELS)
    _write_encoder(model.taesd_encoder, ink)
    _initialize_decoder(model.taesd_decoder)
    latents = latents_of(ink)
    _train_decoder(model.taesd_decoder, ink, latents, CROP_STEPS, LEARNING_RATE, CROP_CELLS)
    cells = latents.shape[-1]
    _train_decoder(model.taesd_decoder, ink, latents, PICTURE_STEPS, LEARNING_RATE / 3, cells)
    with torch.no_grad():
        model.vae_scale.fill_(VAE_SCALE)
        model.vae_shift.fill_(VAE_SHIFT)
    return model


def _cells(ink: Tensor) -> Tensor:
    """Move 8x8 cells into channels the way three convolutions of stride 2 can: 1, 4, 16, 64."""
    for _ in range(3):
        ink = functional.pixel_unshuffle(ink, 2)
    return ink


def _hadamard(size: int) -> Tensor:
    """Orthogonal matrix whose entries all have the same magnitude (Sylvester's construction)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix / size**0.5


def _projection(ink: Tensor) -> tuple[Tensor, Tensor]:
    """Projection ``[16, 64]`` and bias ``[16]`` from the pixels of a cell to its latent."""
    pixels = _cells(ink).movedim(1, -1).reshape(-1, CELL * CELL).double()
    mean = pixels.mean(0)
    variances, vectors = torch.linalg.eigh(torch.cov(pixels.T))
    variances = variances.flip(0)[:LATENT_CHANNELS]
    components = vectors.flip(1)[:, :LATENT_CHANNELS].T
    # An eigenvector's sign is arbitrary; one that LAPACK chose would differ between machines.
    peaks = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * peaks.sign()
    scale = variances ** (TEMPERING / 2)
    scale = scale / scale.square().mean().sqrt()
    # The rotation spreads all components over all channels, so that every variance is one.
    whitened = components / variances.sqrt()[:, None]
    projection = _hadamard(LATENT_CHANNELS).double() @ (scale[:, None] * whitened)
    return projection.float(), -(projection @ mean).float()


@torch.no_grad()
def _write_encoder(encoder: nn.Sequential, ink: Tensor) -> None:
    for tensor in encoder.parameters():
        tensor.zero_()
    # A block whose convolutions are zero passes its input through a ReLU, and ink is positive.
    first, *strided, last = (layer for layer in encoder if isinstance(layer, nn.Conv2d))
    paper = torch.tensor(PAPER)
    direction = torch.tensor(INK) - paper
    first.weight[0, :, 1, 1] = direction / direction.square().sum()
    first.bias[0] = -(first.weight[0, :, 1, 1] * paper).sum()
    for stage, layer in enumerate(strided):
        for channel in range(4**stage):
            for quarter in range(4):
                row, column = divmod(quarter, 2)
                # Tap 1 of a padded 3x3 kernel of stride 2 sees the even pixel, tap 2 the odd one.
                layer.weight[4 * channel + quarter, channel, 1 + row, 1 + column] = 1.0
    projection, bias = _projection(ink)
    last.weight[:, :, 1, 1] = projection
    last.bias.copy_(bias)


@torch.no_grad()
def _initialize_decoder(decoder: nn.Sequential) -> None:
    # ComfyUI's layers are created over uninitialized memory: every tensor is written here.
    for name, tensor in decoder.named_parameters():
        if tensor.ndim != 4:
            tensor.zero_()
            continue
        nn.init.kaiming_normal_(tensor, nonlinearity="relu")
        if name.endswith("conv.4.weight"):
            # Ten residual blocks: start each near the identity.
            tensor.mul_(0.2)


def _crops(ink: Tensor, latents: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Cut ``cells`` x ``cells`` latents and the pictures below them out of a random batch."""
    limit = latents.shape[-1] - cells + 1
    targets, codes = [], []
    for index in torch.randint(len(ink), (BATCH,)).tolist():
        top, left = torch.randint(limit, (2,)).tolist()
        codes.append(latents[index, :, top : top + cells, left : left + cells])
        rows = slice(CELL * top, CELL * (top + cells))
        targets.append(ink[index, :, rows, CELL * left : CELL * (left + cells)])
    return colour(torch.stack(targets)), torch.stack(codes)


def _train_decoder(
    decoder: nn.Sequential, ink: Tensor, latents: Tensor, steps: int, rate: float, cells: int
) -> None:
    optimizer = torch.optim.Adam(decoder.parameters(), lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for step in range(steps):
        pictures, codes = _crops(ink, latents, cells)
        error = decoder(codes + LATENT_NOISE * torch.randn_like(codes)) - pictures
        loss = error.square().mean() + 0.1 * error.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            logger.info("Decoder: step %d of %d, loss %.5f", step, steps, loss.item())


@torch.no_grad()
def reconstruction_psnr(model: TAESD, ink: Tensor) -> float:
    """PSNR in dB of pictures that pass through encoder and decoder."""
    pictures = colour(ink)
    decoded = model.taesd_decoder(model.taesd_encoder(pictures)).clamp(0, 1)
    return float(-10 * functional.mse_loss(decoded, pictures).log10())


def autoencoder_tensors(model: TAESD) -> Mapping[str, Tensor]:
    """Tensors to store: convolutions in float16, scale and shift in float32."""
    return {
        name: (tensor.half() if tensor.ndim else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
