"""The parts of FLUX around its blocks, and the whole transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import DoubleStreamBlock, SingleStreamBlock
from .config import FluxConfig
from .layers import MLPEmbedder, modulate, rope_cos_sin, timestep_embedding


class Embedders(nn.Module):
    """What turns latents, text and timestep into tokens and the modulation vector."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.img_in = nn.Linear(config.in_channels * config.patch_size**2, dim)
        self.txt_in = nn.Linear(config.context_in_dim, dim)
        self.time_in = MLPEmbedder(256, dim)
        self.vector_in = MLPEmbedder(config.vec_in_dim, dim)
        self.guidance_in = MLPEmbedder(256, dim) if config.guidance_embed else None

    def embed(
        self, img: Tensor, txt: Tensor, timesteps: Tensor, y: Tensor, guidance: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed the inputs of one step.

        Args:
            img: Latent patches ``[B, N, patch**2 * C]``.
            txt: Text encoder states ``[B, T, context_in_dim]``.
            timesteps: ``[B]`` in ``[0, 1]``.
            y: Pooled text ``[B, vec_in_dim]``.
            guidance: ``[B]``, or None for a model without guidance embedding.

        Returns:
            ``img [B, N, D]``, ``txt [B, T, D]``, ``vec [B, D]``.
        """
        vec = self.time_in(timestep_embedding(timesteps).to(img.dtype))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(img.dtype))
        return self.img_in(img), self.txt_in(txt), vec + self.vector_in(y)


class LastLayer(nn.Module):
    """Final modulation and projection to latent patches."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.linear = nn.Linear(dim, config.out_channels * config.patch_size**2)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """Project ``x [B, N, D]`` to ``[B, N, patch**2 * C]``."""
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        projected: Tensor = self.linear(modulate(x, shift, scale))
        return projected


class Flux(Embedders):
    """The whole transformer; its ``state_dict`` has the tensor names of BFL's checkpoints."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__(config)
        self.config = config
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config) for _ in range(config.depth_single_blocks)
        )
        self.final_layer = LastLayer(config)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity of latent patches.

        Args:
            img: ``[B, N, patch**2 * C]``.
            img_ids: ``[B, N, 3]``, see ``image_ids``.
            txt: ``[B, T, context_in_dim]``.
            txt_ids: ``[B, T, 3]``, zeros.
            timesteps: ``[B]``.
            y: ``[B, vec_in_dim]``.
            guidance: ``[B]`` or None.

        Returns:
            ``[B, N, patch**2 * C]``.
        """
        img, txt, vec = self.embed(img, txt, timesteps, y, guidance)
        ids = torch.cat((txt_ids, img_ids), dim=1)
        cos, sin = rope_cos_sin(ids, self.config.axes_dim, self.config.theta)
        for block in self.double_blocks:
            img, txt = block(img, txt, cos, sin, block.modulation_vectors(vec))  # type: ignore[operator]
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, cos, sin, block.modulation_vectors(vec))  # type: ignore[operator]
        velocity: Tensor = self.final_layer(x[:, txt.shape[1] :], vec)
        return velocity


def patchify(latent: Tensor, patch_size: int = 2) -> Tensor:
    """Fold ``[B, C, h, w]`` into patches ``[B, (h/2)*(w/2), C*4]``, padding odd sizes circularly.

    Channel-major within a patch, as ComfyUI 0.30's ``Flux.process_img``; its
    ``pad_to_patch_size`` pads circularly too.
    """
    pad_h, pad_w = -latent.shape[-2] % patch_size, -latent.shape[-1] % patch_size
    latent = functional.pad(latent, (0, pad_w, 0, pad_h), mode="circular")
    return functional.pixel_unshuffle(latent, patch_size).flatten(2).transpose(1, 2)


def unpatchify(patches: Tensor, height: int, width: int, patch_size: int = 2) -> Tensor:
    """Undo ``patchify`` for a latent of ``height`` x ``width``."""
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    grid = patches.transpose(1, 2).unflatten(2, (rows, columns))
    return functional.pixel_shuffle(grid, patch_size)[..., :height, :width]


def image_ids(height: int, width: int, batch: int = 1, patch_size: int = 2) -> Tensor:
    """Return positions ``[batch, N, 3]`` of the patches of a ``height`` x ``width`` latent."""
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    grid = torch.zeros(rows, columns, 3)
    grid[..., 1] = torch.arange(rows)[:, None]
    grid[..., 2] = torch.arange(columns)[None, :]
    return grid.reshape(1, -1, 3).expand(batch, -1, -1)
