from __future__ import annotations

import pytest
import torch
from flux_fp4.quant.errors.calibration import NotFiniteError
from flux_fp4.quant.errors.sources import UnsupportedWeightError
from flux_fp4.quant.fp8 import quantize_weight_fp8
from flux_fp4.quant.sqnr import sqnr_db


def normal(rows: int = 130, columns: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    # rows of very different size, as the scale is per row
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 2, rows)[:, None]


def modelopt_fp8(weight: torch.Tensor) -> torch.Tensor:
    """Fake-quantize with ModelOpt's quantizer of the FP8_PER_CHANNEL_PER_TOKEN preset."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=(4, 3), axis=0))
    return quantizer(weight)


def test_dequantized_weight_equals_modelopts_fake_quantization() -> None:
    weight = normal()
    db = sqnr_db(modelopt_fp8(weight), quantize_weight_fp8(weight, "linear").dequantize())
    # ModelOpt multiplies by 448 / amax where we divide by amax / 448: an fp32 rounding apart
    assert db > 100, f"{db:.1f} dB apart; another scale or rounding would give about 30"


def test_scale_is_the_rows_largest_value_over_448() -> None:
    weight = normal()
    quantized = quantize_weight_fp8(weight, "linear")
    assert quantized.values.dtype == torch.float8_e4m3fn
    assert torch.equal(quantized.scale, weight.abs().amax(1) / 448)


def test_every_row_keeps_thirty_db() -> None:
    weight = normal()
    dequantized = quantize_weight_fp8(weight, "linear").dequantize()
    worst = min(sqnr_db(row, got) for row, got in zip(weight, dequantized, strict=True))
    assert worst > 29, f"worst row has {worst:.1f} dB; E4M3 of normal values measures about 31.5"


def test_largest_values_stay_finite() -> None:
    # of these quotients some round to above 448
    weight = torch.rand(4096, 1, generator=torch.Generator().manual_seed(0)) + 1e-3
    assert quantize_weight_fp8(weight, "linear").dequantize().isfinite().all()


def test_row_of_zeros_stays_zero() -> None:
    weight = normal(4, 32)
    weight[2] = 0
    quantized = quantize_weight_fp8(weight, "linear")
    assert quantized.scale[2] == 1
    assert not quantized.dequantize()[2].any()


def test_bf16_weight_gives_the_same_as_its_fp32_copy() -> None:
    weight = normal().bfloat16()
    ours, again = quantize_weight_fp8(weight, "a"), quantize_weight_fp8(weight.float(), "a")
    assert torch.equal(ours.values.view(torch.uint8), again.values.view(torch.uint8))
    assert torch.equal(ours.scale, again.scale)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = normal(4, 16)
    weight[2, 3] = bad
    with pytest.raises(NotFiniteError, match="linear2"):
        quantize_weight_fp8(weight, "linear2")


def test_quantized_weight_is_refused() -> None:
    with pytest.raises(UnsupportedWeightError, match=r"torch\.uint8"):
        quantize_weight_fp8(torch.ones(4, 16, dtype=torch.uint8), "linear1")
