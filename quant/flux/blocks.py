"""FLUX's double-stream and single-stream blocks, modulation vectors passed in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import FluxConfig
from .layers import (
    JointAttention,
    Modulation,
    QKNorm,
    SelfAttention,
    SiLUGate,
    apply_rope,
    modulate,
)


class DoubleStreamBlock(nn.Module):
    """Image and text tokens with weights of their own, attending to each other."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_heads
        if not config.shared_modulation:
            self.img_mod = Modulation(dim, 6)
            self.txt_mod = Modulation(dim, 6)
        self.img_attn = SelfAttention(dim, config.head_dim, config.qkv_bias, config.bias)
        self.img_mlp = _mlp(config)
        self.txt_attn = SelfAttention(dim, config.head_dim, config.qkv_bias, config.bias)
        self.txt_mlp = _mlp(config)
        self.attention = JointAttention()

    def modulation_vectors(self, vec: Tensor) -> tuple[Tensor, ...]:
        """Return 12 vectors ``[B, 1, D]``: shift, scale, gate twice for img, then for txt.

        FLUX.1 only: see ``block_modulation`` for both.
        """
        return (*self.img_mod(vec), *self.txt_mod(vec))

    def forward(
        self, img: Tensor, txt: Tensor, cos: Tensor, sin: Tensor, mods: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            img: ``[B, N, D]``.
            txt: ``[B, T, D]``.
            cos: fp32 ``[B, T + N, head_dim / 2]``, text tokens first.
            sin: As ``cos``.
            mods: What ``block_modulation`` returns.

        Returns:
            ``img [B, N, D]`` and ``txt [B, T, D]``.
        """
        img_mod, txt_mod = mods[:6], mods[6:]
        img_qkv = self._qkv(self.img_attn, modulate(img, *img_mod[:2]))
        txt_qkv = self._qkv(self.txt_attn, modulate(txt, *txt_mod[:2]))
        q, k, v = (
            torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True)
        )  # [B, heads, S, head_dim]
        attn = self.attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
        txt_attn, img_attn = attn.split((txt.shape[1], img.shape[1]), dim=1)
        img = _update(img, self.img_attn.proj(img_attn), self.img_mlp, img_mod)
        txt = _update(txt, self.txt_attn.proj(txt_attn), self.txt_mlp, txt_mod)
        return img, txt

    def _qkv(self, attn: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _split_heads(attn.qkv(x), self.num_heads, attn.norm)


class SingleStreamBlock(nn.Module):
    """Text and image tokens as one sequence; attention and MLP side by side in two Linears."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv_size, self.mlp_in_size = 3 * dim, config.mlp_in_size
        self.linear1 = nn.Linear(dim, self.qkv_size + self.mlp_in_size, bias=config.bias)
        self.mlp_act = _activation(config)
        self.linear2 = nn.Linear(dim + config.mlp_size, dim, bias=config.bias)
        self.norm = QKNorm(config.head_dim)
        if not config.shared_modulation:
            self.modulation = Modulation(dim, 3)
        self.attention = JointAttention()

    def modulation_vectors(self, vec: Tensor) -> tuple[Tensor, ...]:
        """Return shift, scale and gate, ``[B, 1, D]`` each; FLUX.1 only."""
        vectors: tuple[Tensor, ...] = self.modulation(vec)
        return vectors

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mods: tuple[Tensor, ...]) -> Tensor:
        """Run the block on ``x [B, S, D]``; other arguments as in ``DoubleStreamBlock``."""
        shift, scale, gate = mods
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(
            (self.qkv_size, self.mlp_in_size), dim=-1
        )
        q, k, v = _split_heads(qkv, self.num_heads, self.norm)
        attn = self.attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
        hidden = torch.cat((attn, self.mlp_act(mlp)), dim=-1)
        return x + gate * self.linear2(hidden)


def block_from_config(block: str, config: FluxConfig) -> DoubleStreamBlock | SingleStreamBlock:
    """Make the module of a block by its name, on torch's current default device."""
    if block.startswith("double_blocks."):
        return DoubleStreamBlock(config)
    return SingleStreamBlock(config)


def block_modulation(
    block: DoubleStreamBlock | SingleStreamBlock, vec: Tensor, shared: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the vectors ``[B, 1, D]`` that a block is called with.

    Args:
        block: A block of FLUX.1 or FLUX.2.
        vec: Modulation input ``[B, D]``: FLUX.1's blocks make their vectors from it.
        shared: FLUX.2's vectors ``[B, 15, D]``, what ``Embedders.shared_modulation`` returns: 12
            for every double block, then 3 for every single block. None for FLUX.1.

    Returns:
        12 vectors for a double block, 3 for a single one.
    """
    if shared is None:
        return block.modulation_vectors(vec)
    double = isinstance(block, DoubleStreamBlock)
    return (shared[:, :12] if double else shared[:, 12:]).split(1, dim=1)


def _mlp(config: FluxConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.hidden_size, config.mlp_in_size, bias=config.bias),
        _activation(config),
        nn.Linear(config.mlp_size, config.hidden_size, bias=config.bias),
    )


def _activation(config: FluxConfig) -> nn.Module:
    return SiLUGate() if config.gated_mlp else nn.GELU(approximate="tanh")


def _split_heads(qkv: Tensor, num_heads: int, norm: QKNorm) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return norm.query_norm(q).to(v), norm.key_norm(k).to(v), v


def _update(x: Tensor, attn: Tensor, mlp: nn.Sequential, mods: tuple[Tensor, ...]) -> Tensor:
    x = x + mods[2] * attn
    return x + mods[5] * mlp(modulate(x, mods[3], mods[4]))
