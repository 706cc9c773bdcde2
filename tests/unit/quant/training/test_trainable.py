"""Trainable blocks compute what will be packed, and their gradients go where they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flux_fp4.quant.emulation import emulated_block, emulated_linear
from flux_fp4.quant.flux.blocks import DoubleStreamBlock
from flux_fp4.quant.flux.config import block_linears
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.quant.training.rounding import round_e2m1
from flux_fp4.quant.training.trainable import (
    TrainableNVFP4Linear,
    trainable_block,
    trained_tensors,
)
from mixed_checkpoint import save_mixed, stored_linear
from tiny_flux import random_flux
from torch import Tensor, nn

ROWS, COLUMNS = 48, 64
KINDS = ("nvfp4", "nvfp4-awq", "nvfp4-svdquant")


def linear(kind: str) -> tuple[nn.Linear, TrainableNVFP4Linear]:
    torch.manual_seed(0)
    module = nn.Linear(COLUMNS, ROWS)
    stored = stored_linear(kind, module.weight.detach())
    return module, TrainableNVFP4Linear(module.weight.detach(), stored, module.bias.detach())


def stored_tensors(
    kind: str, module: nn.Linear, trained: TrainableNVFP4Linear
) -> dict[str, Tensor]:
    stored = stored_linear(kind, module.weight.detach()) | trained.tensors()
    return {f"linear.{part}": tensor for part, tensor in stored.items()}


def inputs() -> Tensor:
    return torch.randn(2, 9, COLUMNS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_is_what_was_packed(kind: str) -> None:
    module, trained = linear(kind)
    stored = stored_linear(kind, module.weight.detach())
    for part, tensor in trained.tensors().items():
        if part in ("weight", "weight_scale"):
            assert torch.equal(tensor.view(torch.uint8), stored[part].view(torch.uint8)), part


@pytest.mark.parametrize("kind", KINDS)
def test_trained_computes_what_it_stores(kind: str) -> None:
    module, trained = linear(kind)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        trained.steps += 0.4 * torch.randn(trained.steps.shape, generator=generator)
        trained.gain += 0.2 * torch.randn(trained.gain.shape, generator=generator)
        # the branch is stored in bf16
        for factor in (trained.svd_down, trained.svd_up):
            if factor is not None:
                factor.copy_((1.1 * factor).bfloat16())
    stored = stored_tensors(kind, module, trained)
    emulated = emulated_linear("linear", stored, trained.bias)
    with torch.no_grad():
        assert torch.equal(trained(inputs()), emulated(inputs()))


def test_gradients_are_the_straight_through_estimate() -> None:
    _, trained = linear("nvfp4")
    step = trained.block_scale * trained.global_scale
    trained.weight().sum().backward()
    codes = trained.weight().detach().unflatten(-1, (-1, 16)) / step[..., None]
    torch.testing.assert_close(trained.gain.grad, codes.sum(-1) * step)
    inside = trained.steps.detach().abs() <= 6
    expected = step[..., None].expand_as(inside)
    assert trained.steps.grad is not None
    torch.testing.assert_close(trained.steps.grad[inside], expected[inside])


@pytest.mark.parametrize(("value", "sign", "moves"), [(7, 1, True), (7, -1, False), (-7, 1, False)])
def test_saturated_code_moves_back_only(value: float, sign: int, moves: bool) -> None:
    x = torch.tensor([float(value)], requires_grad=True)
    (sign * round_e2m1(x)).sum().backward()
    assert x.grad is not None
    assert bool(x.grad) is moves


@pytest.mark.parametrize("kind", KINDS)
def test_training_reduces_the_error_on_other_inputs(kind: str) -> None:
    module, trained = linear(kind)
    generator = torch.Generator().manual_seed(3)
    # errors of different channels can cancel only where channels go together, as they do in FLUX
    mixing = torch.randn(COLUMNS // 4, COLUMNS, generator=generator) / (COLUMNS // 4) ** 0.5

    def correlated(rows: int) -> Tensor:
        return torch.randn(rows, COLUMNS // 4, generator=generator) @ mixing

    other = correlated(256)
    with torch.no_grad():
        before = sqnr_db(module(other), trained(other))
    optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)
    for _ in range(150):
        x = correlated(256)
        loss = (trained(x) - module(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = sqnr_db(module(other), trained(other))
    # what remains is mostly the rounding of the input, which no weight takes away
    assert after > before + MIN_GAIN_DB[kind], f"{kind}: {before:.2f} to {after:.2f} dB"


MIN_GAIN_DB = {"nvfp4": 0.1, "nvfp4-awq": 0.1, "nvfp4-svdquant": 0.1}


@pytest.mark.parametrize("block", ["double_blocks.0", "single_blocks.1"])
def test_trained_block_is_the_emulated_block_of_its_tensors(tmp_path: Path, block: str) -> None:
    model = random_flux()
    formats = {name: "fp8" if name.endswith("linear2") else "nvfp4" for name in linears(model)}
    checkpoint = save_mixed(model, tmp_path / "tiny.safetensors", formats)
    original = model.get_submodule(block)
    weights = {name: original.get_submodule(name).weight for name in block_linears(block)}
    tensors = checkpoint.block_tensors(block)
    student = trainable_block(original, weights, tensors)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    with torch.enable_grad():
        run(student).square().sum().backward()
    for name, parameter in student.named_parameters():
        if name.endswith(".steps"):
            assert parameter.grad is not None
            # through FP8 as well, where a conversion would round small gradients to zero
            assert parameter.grad.count_nonzero() > 0.9 * parameter.numel(), name
    changed = trained_tensors(student)
    assert not any(name.startswith("linear2.") for name in changed)
    emulated = emulated_block(original, tensors | changed)
    for name, tensor in changed.items():
        if name.endswith(".bias"):
            linear = name.removesuffix(".bias")
            student.get_submodule(linear).bias.data = tensor.float()
            emulated.get_submodule(linear).bias = nn.Parameter(tensor.float())
    with torch.no_grad():
        assert torch.equal(run(student), run(emulated))


def linears(model: nn.Module) -> list[str]:
    blocks = [*(f"double_blocks.{i}" for i in range(1)), *(f"single_blocks.{i}" for i in range(2))]
    return [f"{block}.{name}" for block in blocks for name in block_linears(block)]


def run(block: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    angles = torch.rand(1, 12, 64, generator=generator)
    vec = torch.randn(1, 256, generator=generator)
    mods = block.modulation_vectors(vec)
    if isinstance(block, DoubleStreamBlock):
        img = torch.randn(1, 8, 256, generator=generator)
        txt = torch.randn(1, 4, 256, generator=generator)
        return torch.cat(block(img, txt, angles.cos(), angles.sin(), mods), dim=1)
    x = torch.randn(1, 12, 256, generator=generator)
    return block(x, angles.cos(), angles.sin(), mods)
