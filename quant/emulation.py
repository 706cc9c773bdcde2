"""Blocks in torch that round as the FP4 plan does, over the tensors of a quantized checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .flux.blocks import DoubleStreamBlock, SingleStreamBlock
from .fp8 import FP8Weight
from .nvfp4 import E4M3_MAX, NVFP4Weight, fake_quantize_activation

_Module = TypeVar("_Module", bound=nn.Module)

SOFTMAX_SCALE = 2.0**-8
"""Step of the FP8 softmax output: the smallest power of two, exact in every type, with which
E4M3's 448 reaches the softmax's largest value 1."""


class EmulatedLinear(nn.Module):
    """A Linear whose weight and input are rounded as stored, multiplied in the input's dtype.

    Attributes:
        weight: ``[N, K]``: what the stored codes stand for, in the type to multiply in.
        bias: ``[N]`` or None.
        quantize_input: Rounds ``[..., K]``; None where the input stays in high precision.
        pre_quant_scale: ``[K]`` by which the input is multiplied first, or None.
        branch: Low-rank factors ``down [r, K]`` and ``up [N, r]`` or None; they read the
            multiplied input before it is rounded (SVDQuant, arXiv 2411.05007, eq. 6).
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        quantize_input: Callable[[Tensor], Tensor] | None = None,
        pre_quant_scale: Tensor | None = None,
        branch: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.quantize_input = quantize_input
        self.pre_quant_scale, self.branch = pre_quant_scale, branch

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., K]`` to ``[..., N]`` in ``x``'s dtype."""
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale.to(x.dtype)
        rounded = x if self.quantize_input is None else self.quantize_input(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = functional.linear(rounded, self.weight.to(x.dtype), bias)
        if self.branch is not None:
            down, up = self.branch
            y = y + functional.linear(functional.linear(x, down.to(x.dtype)), up.to(x.dtype))
        return y

    def effective_weight(self) -> Tensor:
        """Return fp32 ``[N, K]``: what acts on the input, but for the input's rounding."""
        weight = self.weight.float()
        if self.branch is not None:
            down, up = self.branch
            weight = weight + up.float() @ down.float()
        if self.pre_quant_scale is not None:
            weight = weight * self.pre_quant_scale.float()
        return weight


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
        block: The block with its biases, norms, modulation and high-precision Linears.
        tensors: Quantized tensors by name relative to the block, as in the checkpoint. Every
            Linear with an ``<linear>.input_scale`` is emulated in its own format, with its
            ``<linear>.bias`` if that is among them; the others stay the block's.
            ``attention.q_scale``, ``.k_scale``, ``.v_scale`` make attention FP8.

    Returns:
        The emulating block; ``block`` is unchanged and shares its other parameters.
    """
    emulated = _copy_tree(block)
    for name in tensors:
        if name.endswith(".input_scale"):
            linear = name.removesuffix(".input_scale")
            module: nn.Linear = block.get_submodule(linear)  # type: ignore[assignment]
            # training changes biases too
            bias = tensors.get(f"{linear}.bias", module.bias)
            twin = emulated_linear(linear, tensors, bias, module.weight.dtype)
            emulated.set_submodule(linear, twin)
    scales = {
        name: tensors[f"attention.{name}"]
        for name in ("q_scale", "k_scale", "v_scale")
        if f"attention.{name}" in tensors
    }
    if scales:
        emulated.attention = EmulatedFP8Attention(scales)  # type: ignore[assignment]
    return emulated


def linear_parts(linear: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one Linear of a block, by names relative to it."""
    start = f"{linear}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def emulated_linear(
    linear: str,
    tensors: Mapping[str, Tensor],
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> EmulatedLinear:
    """Make the emulation of one Linear of a block from its stored tensors.

    Args:
        linear: Name relative to the block.
        tensors: Tensors by name relative to the block; the weight's dtype tells the format: uint8
            is NVFP4, float8_e4m3fn is FP8, anything else is high precision.
        bias: ``[N]`` or None.
        dtype: What to keep the dequantized weight in.
    """
    weight = tensors[f"{linear}.weight"]
    if weight.dtype == torch.uint8:
        return _emulated_nvfp4(linear, tensors, bias, dtype)
    if weight.dtype == torch.float8_e4m3fn:
        stored = FP8Weight(weight, tensors[f"{linear}.weight_scale"])
        quantize = partial(fake_quantize_fp8, scale=tensors[f"{linear}.input_scale"])
        return EmulatedLinear(stored.dequantize().to(dtype), bias, quantize)
    return EmulatedLinear(weight.to(dtype), bias)


def _emulated_nvfp4(
    linear: str, tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
) -> EmulatedLinear:
    weight = NVFP4Weight(
        tensors[f"{linear}.weight"],
        tensors[f"{linear}.weight_scale"],
        tensors[f"{linear}.weight_scale_2"],
    ).dequantize(dtype)
    quantize = partial(fake_quantize_activation, global_scale=tensors[f"{linear}.input_scale"])
    branch = None
    if f"{linear}.svd_down" in tensors:
        branch = (tensors[f"{linear}.svd_down"], tensors[f"{linear}.svd_up"])
    smoothing = tensors.get(f"{linear}.pre_quant_scale")
    return EmulatedLinear(weight, bias, quantize, smoothing, branch)


def _copy_tree(module: _Module) -> _Module:
    # only the tree of modules is copied, no weight is
    twin = copy.copy(module)
    twin._modules = {name: _copy_tree(child) for name, child in module.named_children()}
    return twin
