"""Emulated Linears against arithmetic written out with torch's own casts."""

from __future__ import annotations

import pytest
import torch
from flux_fp4.quant.emulation import emulated_block, emulated_linear
from flux_fp4.quant.sqnr import sqnr_db
from mixed_checkpoint import FORMATS, INPUT_AMAX, stored_linear
from tiny_flux import random_flux
from torch import Tensor, nn
from torch.nn import functional

ROWS, COLUMNS = 48, 64
MIN_SQNR_DB = {"nvfp4": 16.5, "nvfp4-awq": 15.5, "nvfp4-svdquant": 20.0, "fp8": 28.0, "bf16": 50.0}
"""Of the output for normal inputs. Measured: 17.3, 16.5, 21.5, 28.8 and 56.7 dB."""


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"linear": nn.Linear(COLUMNS, ROWS)})


def bias_of(module: nn.Module) -> Tensor | None:
    bias: Tensor | None = module.get_submodule("linear").bias  # type: ignore[assignment]
    return bias


def tensors_of(kind: str, module: nn.Module) -> dict[str, Tensor]:
    weight = module.get_submodule("linear").weight.detach()
    return {f"linear.{part}": tensor for part, tensor in stored_linear(kind, weight).items()}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_approximates_the_linear(kind: str) -> None:
    module = layer()
    emulated = emulated_linear(
        "linear", tensors_of(kind, module), module.get_submodule("linear").bias
    )
    x = torch.randn(2, 9, COLUMNS, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        db = sqnr_db(module.get_submodule("linear")(x), emulated(x))
    assert db >= MIN_SQNR_DB[kind], f"{kind}: {db:.1f} dB"


def test_fp8_is_a_product_of_e4m3_values() -> None:
    module = layer()
    tensors = tensors_of("fp8", module)
    x = 3 * torch.randn(9, COLUMNS, generator=torch.Generator().manual_seed(1))
    codes = (x * 448 / INPUT_AMAX).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert (codes.float().abs() == 448).any(), "an input beyond the calibrated maximum saturates"
    product = codes.double() @ tensors["linear.weight"].double().T
    scale = tensors["linear.weight_scale"].double() * INPUT_AMAX / 448
    expected = product * scale + module.get_submodule("linear").bias.double()
    db = sqnr_db(
        expected,
        emulated_linear("linear", tensors, bias_of(module))(x).double(),
    )
    assert db >= 120, f"{db:.1f} dB"


def test_branch_reads_the_multiplied_input_before_it_is_rounded() -> None:
    module = layer()
    tensors = tensors_of("nvfp4-svdquant", module)
    x = torch.randn(9, COLUMNS, generator=torch.Generator().manual_seed(1))
    whole = emulated_linear("linear", tensors, bias_of(module))(x)
    only_codes = {name: t for name, t in tensors.items() if "svd" not in name}
    branch = whole - emulated_linear("linear", only_codes, bias_of(module))(x)
    smooth = x * tensors["linear.pre_quant_scale"].float()
    low_rank = smooth @ tensors["linear.svd_down"].float().T @ tensors["linear.svd_up"].float().T
    db = sqnr_db(low_rank, branch)
    assert db >= 100, f"{db:.1f} dB"


@pytest.mark.parametrize("kind", FORMATS)
def test_effective_weight_is_the_map_without_input_rounding(kind: str) -> None:
    module = layer()
    emulated = emulated_linear(
        "linear", tensors_of(kind, module), module.get_submodule("linear").bias
    )
    emulated.quantize_input = None
    x = torch.randn(9, COLUMNS, generator=torch.Generator().manual_seed(1))
    expected = functional.linear(x, emulated.effective_weight(), emulated.bias)
    db = sqnr_db(expected, emulated(x))
    assert db >= 100, f"{kind}: {db:.1f} dB"


def test_formats_mix_within_a_block() -> None:
    block = random_flux().get_submodule("single_blocks.0")
    weight = block.get_submodule("linear2").weight
    tensors = {f"linear2.{part}": t for part, t in stored_linear("fp8", weight).items()}
    emulated = emulated_block(block, tensors)
    assert emulated.linear1.weight is block.linear1.weight, (
        "a Linear without scales stays the block's own"
    )
    x = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(1))
    db = sqnr_db(block.linear2(x), emulated.linear2(x))
    assert db >= MIN_SQNR_DB["fp8"], f"{db:.1f} dB"
