"""FLUX's layers over BFL's tensor names, with nothing written in place.

ComfyUI's own blocks add to their inputs in place and call kernels that no exporter knows; these
compute the same (tested to 1e-5 in fp32) and can be calibrated, trained and restated as ONNX.
Shapes: ``B`` batch, ``N`` image tokens, ``T`` text tokens, ``S = T + N``, ``D`` hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYER_NORM_EPS = 1e-6
"""black-forest-labs/flux ``modules/layers.py``."""

RMS_NORM_EPS = 2.0**-23
"""ComfyUI 0.30 leaves ``eps`` unset: torch 2.11 takes fp32's machine epsilon for every dtype."""


def rope_cos_sin(ids: Tensor, axes_dim: Sequence[int], theta: int) -> tuple[Tensor, Tensor]:
    """Compute the rotary embedding of token positions.

    Args:
        ids: Positions ``[B, S, len(axes_dim)]``.
        axes_dim: Channels of a head given to each axis.
        theta: Base of the frequencies.

    Returns:
        ``cos`` and ``sin``, fp32 ``[B, S, sum(axes_dim) / 2]``. Angles are computed in fp64 as in
        BFL's ``math.py::rope``.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        angles.append(ids[..., axis, None].double() * theta**-exponent)
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of ``x [B, heads, S, head_dim]`` in fp32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


TIMESTEP_FACTOR = 1000.0
"""What timesteps and guidance are multiplied by first (BFL ``layers.py``)."""


def timestep_frequencies(dim: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Return the fp32 ``[dim / 2]`` angular frequencies of ``timestep_embedding``."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32) / half
    return torch.exp(-math.log(max_period) * exponent)


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """Embed ``t [B]`` in ``[0, 1]`` as ``[B, dim]`` cosines and sines (BFL ``layers.py``)."""
    angle = (TIMESTEP_FACTOR * t)[:, None].float() * timestep_frequencies(dim).to(t.device)
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(t.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalize ``x [B, L, D]`` without affine weights, then scale and shift by ``[B, 1, D]``."""
    normalized = functional.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
    return (1 + scale) * normalized + shift


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis; the weight is called ``scale`` in BFL's files."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x [..., dim]``."""
        return functional.rms_norm(x, self.scale.shape, self.scale, RMS_NORM_EPS)


class QKNorm(nn.Module):
    """Norms of queries and keys."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)


class MLPEmbedder(nn.Module):
    """Two Linears around SiLU that embed timestep, guidance and pooled text."""

    def __init__(self, in_dim: int, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim, bias=bias)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Embed ``x [B, in_dim]`` as ``[B, hidden_dim]``."""
        embedded: Tensor = self.out_layer(functional.silu(self.in_layer(x)))
        return embedded


class Modulation(nn.Module):
    """Shift, scale and gate vectors of a block, or of all blocks of a kind."""

    def __init__(self, dim: int, vectors: int, bias: bool = True) -> None:
        super().__init__()
        self.vectors = vectors
        self.lin = nn.Linear(dim, vectors * dim, bias=bias)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """Return ``vectors`` tensors ``[B, 1, D]`` from ``vec [B, D]``."""
        return self.lin(functional.silu(vec))[:, None].chunk(self.vectors, dim=-1)


class SelfAttention(nn.Module):
    """The Linears and norms of one stream's attention."""

    def __init__(self, dim: int, head_dim: int, qkv_bias: bool, proj_bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm = QKNorm(head_dim)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)


class SiLUGate(nn.Module):
    """The activation of FLUX.2's MLPs: one half, through SiLU, times the other half."""

    def forward(self, x: Tensor) -> Tensor:
        """Halve ``x [..., 2 * dim]`` to ``[..., dim]``; the first half is the gate."""
        gate, value = x.chunk(2, dim=-1)
        return functional.silu(gate) * value


class JointAttention(nn.Module):
    """Attention over all tokens. A module of its own so that calibration can observe q, k and v."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend: ``[B, heads, S, head_dim]`` each, after RoPE, to ``[B, S, heads * head_dim]``."""
        attended = functional.scaled_dot_product_attention(q, k, v)
        return attended.transpose(1, 2).flatten(2)
