"""The searches against ModelOpt's calibrator and packer, and against trying every scale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flux_fp4.quant.errors.calibration import NotFiniteError
from flux_fp4.quant.nvfp4 import NVFP4Weight, Search, quantize_weight
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.tests.unit.quant.sample_weights import heavy_tails, normal, with_zero_blocks


def modelopt_dequantized(
    weight: torch.Tensor, global_scale: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Quantize by given scales ``[N, K/16]`` with ModelOpt's packer, and unpack with ours."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    packed, _, _ = NVFP4QTensor.quantize(weight, 16, scale, global_scale)
    data = packed._quantized_data.view(torch.uint8)
    return NVFP4Weight(data, scale, global_scale).dequantize()


def modelopt_four_over_six(weight: torch.Tensor) -> torch.Tensor:
    """Run ModelOpt's calibrator as NVFP4_FOUR_OVER_SIX_CFG does; return its E4M3 block scales."""
    from modelopt.torch.quantization.calib.mse import MseCalibrator
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import _cast_per_block_scale_to_fp8
    from modelopt.torch.quantization.utils.numeric_utils import E4M3_MAX_46

    amax = weight.abs().amax()

    def scale_of(block_amax: torch.Tensor) -> torch.Tensor:
        scale = block_amax / 6.0
        return _cast_per_block_scale_to_fp8(scale, amax / 6.0, E4M3_MAX_46)

    def quantized(blocks: torch.Tensor, block_amax: torch.Tensor) -> torch.Tensor:
        scale = scale_of(block_amax).view(len(weight), -1)
        flat = modelopt_dequantized(blocks.view_as(weight), amax / (6 * E4M3_MAX_46), scale)
        return flat.view_as(blocks)

    blocks = weight.reshape(-1, 16)
    calibrator = MseCalibrator(
        blocks.abs().amax(1, keepdim=True),
        axis=0,
        step_size=0.5,
        start_multiplier=1.0,
        stop_multiplier=1.5,
        quant_func=quantized,
    )
    calibrator.collect(blocks)
    return scale_of(calibrator.compute_amax()).view(len(weight), -1)


def errors_of_every_scale(weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """Return ``[126, N, K/16]``: the squared error of each block by each positive E4M3 scale."""
    from modelopt.torch.kernels.quantization.gemm._fp8_scale_candidates import fp8_scale_candidates

    global_scale = weight.abs().amax() / (6 * 256)
    errors = []
    for candidate in fp8_scale_candidates() * 448:
        scale = torch.full((len(weight), weight.shape[1] // 16), candidate)
        scale = scale.to(torch.float8_e4m3fn)
        values = modelopt_dequantized(weight, global_scale, scale)
        errors.append(block_errors(weight, values, importance))
    return torch.stack(errors)


def block_errors(
    weight: torch.Tensor,
    quantized: NVFP4Weight | torch.Tensor,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    values = quantized.dequantize() if isinstance(quantized, NVFP4Weight) else quantized
    channels = torch.ones(weight.shape[1]) if importance is None else importance
    error = (weight - values).double().square() * channels.double()
    return error.unflatten(-1, (-1, 16)).sum(-1)


def wide_range() -> torch.Tensor:
    """Blocks over eighteen powers of two, down to where E4M3 has but subnormal scales."""
    return normal(72, 128, seed=3) * torch.logspace(0, -18, 72, base=2.0)[:, None]


def few_levels() -> torch.Tensor:
    """Blocks that scales far from the usual represent exactly."""
    generator = torch.Generator().manual_seed(4)
    levels = torch.tensor([0.0, 1.0, -1.0, 2.0])
    return (
        levels[torch.randint(4, (64, 96), generator=generator)] * torch.logspace(0, -3, 64)[:, None]
    )


SEARCHED = {
    "normal": lambda: normal(96, 128),
    "heavy_tails": heavy_tails,
    "zero_blocks": with_zero_blocks,
    "wide_range": wide_range,
    "few_levels": few_levels,
}


@pytest.mark.parametrize("make", SEARCHED.values(), ids=SEARCHED)
def test_four_over_six_chooses_modelopts_scales(make: Callable[[], torch.Tensor]) -> None:
    weight = make()
    ours = quantize_weight(weight, "linear", search="four-over-six")
    theirs = modelopt_four_over_six(weight)
    # ModelOpt gives a block of zeros another scale, which does not matter
    used = weight.unflatten(-1, (-1, 16)).abs().amax(-1) > 0
    differs = (ours.block_scale.float() != theirs.float()) & used
    assert differs.float().mean() < 0.2
    values = modelopt_dequantized(weight, ours.global_scale, theirs)
    error, least = block_errors(weight, ours), block_errors(weight, values)
    # where 4 and 6 are equally good, the rounding of the sums decides
    assert torch.allclose(error[differs], least[differs], rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("make", SEARCHED.values(), ids=SEARCHED)
def test_mse_finds_the_best_of_all_126_scales(
    make: Callable[[], torch.Tensor], weighted: bool
) -> None:
    weight = make()
    generator = torch.Generator().manual_seed(5)
    importance = torch.rand(weight.shape[1], generator=generator) ** 8 if weighted else None
    least = errors_of_every_scale(weight, importance).amin(0)
    found = quantize_weight(weight, "linear", search="mse", importance=importance)
    error = block_errors(weight, found, importance)
    # two scales whose errors differ by fp32 rounding are equally good
    worse = error > least * (1 + 1e-5) + 1e-12 * weight.abs().amax().item() ** 2
    assert not worse.any(), f"{int(worse.sum())} of {worse.numel()} blocks have a better scale"


def test_mse_looks_below_every_scale_for_a_channel_without_importance() -> None:
    weight = normal(32, 64)
    weight[:, ::16] *= 100
    importance = torch.ones(64)
    importance[::16] = 0
    least = errors_of_every_scale(weight, importance).amin(0)
    found = quantize_weight(weight, "linear", search="mse", importance=importance)
    assert torch.allclose(block_errors(weight, found, importance), least, rtol=1e-5, atol=0)


def test_searches_raise_the_sqnr_of_a_normal_weight() -> None:
    weight = normal(256, 512)
    largest, two, every = (
        sqnr_db(weight, quantize_weight(weight, "linear", search=search).dequantize())
        for search in ("max", "four-over-six", "mse")
    )
    measured = f"SQNR {largest:.2f} dB max, {two:.2f} dB four-over-six, {every:.2f} dB mse"
    assert largest + 0.5 < two < every - 0.3, measured


@pytest.mark.parametrize("search", ["four-over-six", "mse"])
def test_importance_moves_error_to_channels_that_matter_less(search: Search) -> None:
    weight = normal(256, 512)
    importance = torch.logspace(-2, 2, 512)[torch.randperm(512)]
    plain = block_errors(weight, quantize_weight(weight, "a", search), importance).sum()
    weighted_by = quantize_weight(weight, "a", search, importance)
    gain = 10 * torch.log10(plain / block_errors(weight, weighted_by, importance).sum()).item()
    assert gain > 0.3, f"weighing gained {gain:.2f} dB of weighted error"


@pytest.mark.parametrize("search", ["four-over-six", "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_searches_take_every_source_dtype(search: Search, dtype: torch.dtype) -> None:
    weight = normal(70, 64).to(dtype)
    ours, again = (quantize_weight(w, "linear", search) for w in (weight, weight.float()))
    assert torch.equal(ours.packed, again.packed)
    assert torch.equal(ours.block_scale.view(torch.uint8), again.block_scale.view(torch.uint8))


@pytest.mark.parametrize("search", ["max", "four-over-six", "mse"])
def test_weight_of_zeros_stays_zero_with_scale_one(search: Search) -> None:
    quantized = quantize_weight(torch.zeros(2, 32), "linear", search)
    assert quantized.block_scale.float().eq(1).all()
    assert quantized.global_scale == 1
    assert not quantized.dequantize().any()


def test_importance_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"importance is \[32\], the weight \[4, 16\]"):
        quantize_weight(torch.ones(4, 16), "linear", "mse", torch.ones(32))


def test_importance_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(NotFiniteError, match="linear1"):
        quantize_weight(torch.ones(4, 16), "linear1", "mse", torch.full((16,), torch.nan))
