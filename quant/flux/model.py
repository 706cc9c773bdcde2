"""The parts of FLUX around its blocks, and the whole transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import DoubleStreamBlock, SingleStreamBlock, block_modulation
from .config import FluxConfig
from .layers import MLPEmbedder, Modulation, modulate, rope_cos_sin, timestep_embedding


class Embedders(nn.Module):
    """What turns latents, text and timestep into tokens and modulation."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        dim, bias = config.hidden_size, config.bias
        self.img_in = nn.Linear(config.in_channels * config.patch_size**2, dim, bias=bias)
        self.txt_in = nn.Linear(config.context_in_dim, dim, bias=bias)
        self.time_in = MLPEmbedder(256, dim, bias)
        self.vector_in = MLPEmbedder(config.vec_in_dim, dim) if config.vec_in_dim else None
        self.guidance_in = MLPEmbedder(256, dim, bias) if config.guidance_embed else None
        if config.shared_modulation:
            self.double_stream_modulation_img = Modulation(dim, 6, bias=False)
            self.double_stream_modulation_txt = Modulation(dim, 6, bias=False)
            self.single_stream_modulation = Modulation(dim, 3, bias=False)
        self._shares_modulation = config.shared_modulation

    def embed(
        self,
        img: Tensor,
        txt: Tensor,
        timesteps: Tensor,
        y: Tensor | None,
        guidance: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed the inputs of one step.

        Args:
            img: Latent patches ``[B, N, patch**2 * C]``.
            txt: Text encoder states ``[B, T, context_in_dim]``.
            timesteps: ``[B]`` in ``[0, 1]``.
            y: Pooled text ``[B, vec_in_dim]``; ignored by a model that takes none.
            guidance: ``[B]``, or None for a model without guidance embedding.

        Returns:
            ``img [B, N, D]``, ``txt [B, T, D]``, ``vec [B, D]``.
        """
        vec = self.time_in(timestep_embedding(timesteps).to(img.dtype))
        if self.guidance_in is not None and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance).to(img.dtype))
        if self.vector_in is not None:
            vec = vec + self.vector_in(y)
        return self.img_in(img), self.txt_in(txt), vec

    def shared_modulation(self, vec: Tensor) -> Tensor | None:
        """Return FLUX.2's modulation vectors from ``vec [B, D]``; None where blocks have theirs.

        They are ``[B, 15, D]``: six for the image stream of double blocks, six for their text
        stream, three for single blocks.
        """
        if not self._shares_modulation:
            return None
        img, txt = self.double_stream_modulation_img, self.double_stream_modulation_txt
        vectors = (*img(vec), *txt(vec), *self.single_stream_modulation(vec))
        return torch.cat(vectors, dim=1)


class LastLayer(nn.Module):
    """Final modulation and projection to latent patches."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        dim, bias = config.hidden_size, config.bias
        self.linear = nn.Linear(dim, config.out_channels * config.patch_size**2, bias=bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim, bias=bias))

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
        y: Tensor | None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity of latent patches.

        Args:
            img: ``[B, N, patch**2 * C]``.
            img_ids: ``[B, N, axes]``, see ``image_ids``.
            txt: ``[B, T, context_in_dim]``.
            txt_ids: ``[B, T, axes]``, see ``text_ids``.
            timesteps: ``[B]``.
            y: ``[B, vec_in_dim]``, or None for a model without pooled text.
            guidance: ``[B]`` or None.

        Returns:
            ``[B, N, patch**2 * C]``.
        """
        img, txt, vec = self.embed(img, txt, timesteps, y, guidance)
        ids = torch.cat((txt_ids, img_ids), dim=1)
        cos, sin = rope_cos_sin(ids, self.config.axes_dim, self.config.theta)
        shared = self.shared_modulation(vec)
        for block in self.double_blocks:
            img, txt = block(img, txt, cos, sin, block_modulation(block, vec, shared))  # type: ignore[arg-type]
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, cos, sin, block_modulation(block, vec, shared))  # type: ignore[arg-type]
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


def image_ids(
    height: int,
    width: int,
    batch: int = 1,
    patch_size: int = 2,
    axes: int = 3,
    origin: tuple[float, int, int] = (0.0, 0, 0),
) -> Tensor:
    """Return positions ``[batch, N, axes]`` of the patches of a ``height`` x ``width`` latent.

    ``origin`` is the position of the first patch along the first three axes: index, row, column.
    """
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    grid = torch.zeros(rows, columns, axes)
    grid[..., 0] = origin[0]
    grid[..., 1] = origin[1] + torch.arange(rows)[:, None]
    grid[..., 2] = origin[2] + torch.arange(columns)[None, :]
    return grid.reshape(1, -1, axes).expand(batch, -1, -1)


def text_ids(length: int, config: FluxConfig, batch: int = 1) -> Tensor:
    """Return positions ``[batch, length, axes]`` of text tokens (ComfyUI 0.30, ``Flux._forward``).

    FLUX.1 puts all of them at the origin, FLUX.2 counts them along its last axis.
    """
    ids = torch.zeros(batch, length, len(config.axes_dim))
    for axis in config.txt_ids_dims:
        ids[..., axis] = torch.arange(length)
    return ids


def tensor_shapes(config: FluxConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a transformer by its name in BFL's checkpoints."""
    with torch.device("meta"):
        state = Flux(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
