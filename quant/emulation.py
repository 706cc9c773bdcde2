"""Blocks in torch that round as the FP4 plan does, over the tensors of a quantized checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .flux.blocks import DoubleStreamBlock, SingleStreamBlock
from .nvfp4 import E4M3_MAX, NVFP4Weight, fake_quantize_activation

_Module = TypeVar("_Module", bound=nn.Module)

SOFTMAX_SCALE = 2.0**-8
"""Step of the FP8 softmax output: the smallest power of two, exact in every type, with which
E4M3's 448 reaches the softmax's largest value 1."""


class EmulatedLinear(nn.Module):
    """A Linear with an NVFP4 weight and dynamically quantized NVFP4 input, computed in fp32."""

    def __init__(self, weight: NVFP4Weight, bias: Tensor | None, input_scale: Tensor) -> None:
        super().__init__()
        self.weight = weight.dequantize()
        self.bias = bias
        self.input_scale = input_scale

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., K]`` to ``[..., N]`` in ``x``'s dtype."""
        quantized = fake_quantize_activation(x, self.input_scale)
        return functional.linear(quantized, self.weight.to(x.dtype), self.bias)


class EmulatedFP8Attention(nn.Module):
    """Attention with q, k, v and softmax output rounded to E4M3 by static scales.

    Args:
        scales: ``q_scale``, ``k_scale``, ``v_scale``: fp32 scalars, ``amax / 448``; those of q and
            k refer to q and k times ``head_dim ** -0.25``, as the plan multiplies both.
    """

    def __init__(self, scales: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.scales = {name: scale.float() for name, scale in scales.items()}

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As ``JointAttention.forward``."""
        root = attention_root_scale(q.shape[-1])
        q = fake_quantize_fp8(q * root, self.scales["q_scale"])
        k = fake_quantize_fp8(k * root, self.scales["k_scale"])
        v = fake_quantize_fp8(v, self.scales["v_scale"])
        softmax = functional.softmax(q @ k.transpose(-1, -2), dim=-1)
        step = torch.tensor(SOFTMAX_SCALE, device=q.device)
        attended = fake_quantize_fp8(softmax, step) @ v
        return attended.transpose(1, 2).flatten(2)


def attention_root_scale(head_dim: int) -> float:
    """Return ``head_dim ** -0.25``: q and k take the root each, so neither overflows E4M3."""
    return float(head_dim**-0.25)


def fake_quantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Round ``x`` to E4M3 times ``scale`` (fp32 scalar), saturating at 448."""
    clamped = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX)
    return (clamped.to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def emulated_block(
    block: DoubleStreamBlock | SingleStreamBlock, tensors: Mapping[str, Tensor]
) -> DoubleStreamBlock | SingleStreamBlock:
    """Return a copy of a block whose Linears and attention round as the plan's do.

    Args:
        block: The block with its biases, norms and modulation.
        tensors: Quantized tensors by name relative to the block, as in the checkpoint:
            ``<linear>.weight``, ``.weight_scale``, ``.weight_scale_2``, ``.input_scale``, and
            ``attention.q_scale``, ``.k_scale``, ``.v_scale`` when attention is FP8.

    Returns:
        The emulating block; ``block`` is unchanged and shares its other parameters.
    """
    emulated = _copy_tree(block)
    for name in tensors:
        if name.endswith(".input_scale"):
            linear = name.removesuffix(".input_scale")
            emulated.set_submodule(linear, emulated_linear(linear, tensors, block))
    scales = {
        name: tensors[f"attention.{name}"]
        for name in ("q_scale", "k_scale", "v_scale")
        if f"attention.{name}" in tensors
    }
    if scales:
        emulated.attention = EmulatedFP8Attention(scales)  # type: ignore[assignment]
    return emulated


def emulated_linear(linear: str, tensors: Mapping[str, Tensor], block: nn.Module) -> EmulatedLinear:
    """Make the emulation of one Linear of a block from its quantized tensors."""
    weight = NVFP4Weight(
        tensors[f"{linear}.weight"],
        tensors[f"{linear}.weight_scale"],
        tensors[f"{linear}.weight_scale_2"],
    )
    bias = block.get_submodule(linear).bias
    return EmulatedLinear(weight, bias, tensors[f"{linear}.input_scale"])  # type: ignore[arg-type]


def _copy_tree(module: _Module) -> _Module:
    # only the tree of modules is copied, no weight is
    twin = copy.copy(module)
    twin._modules = {name: _copy_tree(child) for name, child in module.named_children()}
    return twin
