"""Quantized blocks whose codes, block scales and biases can be trained.

A stored NVFP4 weight is ``code * block_scale * global_scale``. Training keeps a continuous value
behind each code and moves it, while the forward pass rounds as the plan does: what is measured in
training is what will be packed. Scales are trained as in ModelOpt 0.47's Dual-LSQ
(``config.py::LSQConfig`` with ``learnable_amax="post"``; after Esser et al. 2019,
arXiv:1902.08153): codes are chosen by the scale that calibration found and multiplied by one that
is trained. ModelOpt's own module needs Triton, which Windows and CPUs lack (docs/adr/0012).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..e2m1 import encode_e2m1, pack_codes
from ..emulation import SOFTMAX_SCALE, attention_root_scale, emulated_block, linear_parts
from ..nvfp4 import NVFP4_BLOCK
from ..stack import Block
from .rounding import round_block_scale, round_e2m1, round_fp8, round_nvfp4_activation


class TrainableNVFP4Linear(nn.Module):
    """An NVFP4 Linear in training; forward gives what ``EmulatedLinear`` gives after packing.

    Attributes:
        steps: fp32 ``[N, K/16, 16]``, trained: the weight in parts of its block's step, so that
            one is the distance of two codes below 2 in every Linear of every model.
        gain: fp32 ``[N, K/16]``, trained: relative change of the block scales.
        bias: fp32 ``[N]``, trained, or None.
        block_scale: fp32 ``[N, K/16]``: E4M3 values, as calibration chose them.
        global_scale: fp32 scalar.
        input_scale: fp32 scalar.
        pre_quant_scale: ``[K]`` or None.
        svd_down: fp32 ``[r, K]``, trained, or None.
        svd_up: fp32 ``[N, r]``, trained, or None.
    """

    pre_quant_scale: Tensor | None
    block_scale: Tensor
    global_scale: Tensor
    input_scale: Tensor

    def __init__(self, weight: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        """Start from a packed Linear.

        Args:
            weight: ``[N, K]``: the weight that was packed.
            tensors: What ``quantize_linear`` made of it, by name relative to the Linear.
            bias: ``[N]`` or None.
        """
        super().__init__()
        self.svd_down = _optional_parameter(tensors.get("svd_down"))
        self.svd_up = _optional_parameter(tensors.get("svd_up"))
        self.register_buffer("pre_quant_scale", tensors.get("pre_quant_scale"))
        self.register_buffer("block_scale", tensors["weight_scale"].float())
        self.register_buffer("global_scale", tensors["weight_scale_2"].float())
        self.register_buffer("input_scale", tensors["input_scale"].float())
        weight = weight.float()
        if self.pre_quant_scale is not None:
            weight = weight / self.pre_quant_scale.float()
        if self.svd_up is not None and self.svd_down is not None:
            weight = weight - self.svd_up.detach() @ self.svd_down.detach()
        step = self.block_scale * self.global_scale
        blocks = weight.unflatten(-1, (-1, NVFP4_BLOCK))
        self.steps = _parameter(blocks / step[..., None])
        self.gain = _parameter(torch.zeros_like(self.block_scale))
        self.bias = _optional_parameter(bias)

    def weight(self) -> Tensor:
        """Return the fp32 ``[N, K]`` weight that the plan multiplies by."""
        scale = round_block_scale(self.block_scale * (1 + self.gain)) * self.global_scale
        return (round_e2m1(self.steps) * scale[..., None]).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., K]`` to ``[..., N]`` in ``x``'s dtype."""
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale.to(x.dtype)
        rounded = round_nvfp4_activation(x, self.input_scale)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = functional.linear(rounded, self.weight().to(x.dtype), bias)
        if self.svd_up is not None and self.svd_down is not None:
            inner = functional.linear(x, self.svd_down.to(x.dtype))
            y = y + functional.linear(inner, self.svd_up.to(x.dtype))
        return y

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that training changed, as the checkpoint stores them."""
        with torch.no_grad():
            scale = round_block_scale(self.block_scale * (1 + self.gain))
            codes = encode_e2m1(self.steps.flatten(-2))
            stored = {"weight": pack_codes(codes), "weight_scale": scale.to(torch.float8_e4m3fn)}
            kept = {"bias": self.bias, "svd_down": self.svd_down, "svd_up": self.svd_up}
            return stored | {k: t.bfloat16() for k, t in kept.items() if t is not None}


class TrainableFP8Attention(nn.Module):
    """``EmulatedFP8Attention`` with gradients."""

    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    softmax_scale: Tensor

    def __init__(self, scales: Mapping[str, Tensor]) -> None:
        super().__init__()
        for part in ("q", "k", "v"):
            self.register_buffer(f"{part}_scale", scales[f"{part}_scale"].float())
        self.register_buffer("softmax_scale", torch.tensor(SOFTMAX_SCALE))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As ``JointAttention.forward``."""
        root = attention_root_scale(q.shape[-1])
        q = round_fp8(q * root, self.q_scale)
        k = round_fp8(k * root, self.k_scale)
        softmax = functional.softmax(q @ k.transpose(-1, -2), dim=-1)
        attended = round_fp8(softmax, self.softmax_scale) @ round_fp8(v, self.v_scale)
        return attended.transpose(1, 2).flatten(2)


def trainable_block(
    block: Block, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Block:
    """Return a copy of a block whose NVFP4 Linears can be trained.

    Args:
        block: In full precision; unchanged, and its other parameters are shared and frozen.
        weights: ``[N, K]`` by Linear: what was packed.
        tensors: Quantized tensors by name relative to the block. Linears in FP8 round, and stay as
            they are.
    """
    student = emulated_block(block, tensors)
    for linear, weight in weights.items():
        if tensors[f"{linear}.weight"].dtype == torch.float8_e4m3fn:
            rounding: Any = student.get_submodule(linear)
            # the conversion to float8 would round gradients to float8 as well
            rounding.quantize_input = partial(
                round_fp8, scale=tensors[f"{linear}.input_scale"].float()
            )
        if tensors[f"{linear}.weight"].dtype != torch.uint8:
            continue
        parts = linear_parts(linear, tensors)
        module: Any = block.get_submodule(linear)
        student.set_submodule(linear, TrainableNVFP4Linear(weight, parts, module.bias))
    if "attention.q_scale" in tensors:
        scales = {f"{part}_scale": tensors[f"attention.{part}_scale"] for part in ("q", "k", "v")}
        student.attention = TrainableFP8Attention(scales)  # type: ignore[assignment]
    return student


def trained_tensors(student: Block) -> dict[str, Tensor]:
    """Return what training changed, by names relative to the block, as the checkpoint stores it."""
    return {
        f"{name}.{part}": tensor
        for name, module in student.named_modules()
        if isinstance(module, TrainableNVFP4Linear)
        for part, tensor in module.tensors().items()
    }


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.to(torch.float32, copy=True))


def _optional_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else _parameter(tensor)
