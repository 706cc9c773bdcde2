"""Weights and gradients against ModelOpt's Dual-LSQ, whose Triton kernel is replaced."""

from __future__ import annotations

import pytest
import torch
from flux_fp4.quant.e2m1 import round_to_e2m1
from flux_fp4.quant.nvfp4 import E4M3_MAX
from flux_fp4.quant.training.trainable import TrainableNVFP4Linear
from mixed_checkpoint import stored_linear
from torch import Tensor

ROWS, COLUMNS = 48, 64


def modelopt_weight(weight: Tensor, trained: TrainableNVFP4Linear, post: Tensor) -> Tensor:
    """What ModelOpt makes of a weight whose blocks of 16 have our scales; ``post`` is trained."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn.modules import tensor_quantizer
    from modelopt.torch.quantization.tensor_quant import FP4CastSTEFunction

    config = QuantizerAttributeConfig(
        num_bits=(2, 1), block_sizes={-1: 16, "type": "static", "scale_bits": (4, 3)}
    )
    quantizer = tensor_quantizer.StaticBlockScaleQuantizer.from_tensor_quantizer(
        tensor_quantizer.TensorQuantizer(config), global_amax=trained.global_scale * 6 * 448
    )
    quantizer.amax = (trained.block_scale * trained.global_scale * 6).flatten()
    quantizer.enable_lsq(quantize_scales=True, learnable_amax=["post"])
    del quantizer._amax_post
    quantizer._amax_post = post

    class OnCPU(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor, out_dtype: object = None) -> Tensor:
            ctx.save_for_backward(x)  # type: ignore[attr-defined]
            return round_to_e2m1(x.abs()).copysign_(x)

        backward = FP4CastSTEFunction.backward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_quantizer, "fp4_cast_ste", OnCPU.apply)
        blocks: Tensor = quantizer._fake_quantize(weight.view(-1, 16))
    return blocks.view(weight.shape)


def test_weight_and_gradients_are_those_of_dual_lsq() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    trained = TrainableNVFP4Linear(weight, stored_linear("nvfp4", weight), None)
    changed = 1 + 0.3 * torch.randn(trained.gain.shape, generator=generator)
    with torch.no_grad():
        trained.gain.copy_(changed - 1)
    step = trained.block_scale * trained.global_scale
    theirs = weight.clone().requires_grad_()
    post = (6 * step * changed).flatten().requires_grad_()
    direction = torch.randn(ROWS, COLUMNS, generator=generator)

    ours = trained.weight()
    expected = modelopt_weight(theirs, trained, post)
    torch.testing.assert_close(ours, expected)
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()

    assert theirs.grad is not None
    assert post.grad is not None
    assert trained.steps.grad is not None
    # beyond 6 ours may move back, ModelOpt's stays; both count in other units
    inside = trained.steps.detach().abs() <= 6
    by_weight = (trained.steps.grad / step[..., None])[inside]
    torch.testing.assert_close(by_weight, theirs.grad.view(inside.shape)[inside])
    # a scale beyond E4M3's range may come back, too
    within = trained.block_scale * changed <= E4M3_MAX
    assert within.float().mean() > 0.9
    by_gain = (post.grad.view(step.shape) * 6 * step)[within]
    torch.testing.assert_close(trained.gain.grad[within], by_gain)
