from __future__ import annotations

from typing import Any

import pytest
import torch
from flux_fp4.quant.errors.calibration import CalibrationError, NotFiniteError
from flux_fp4.quant.modelopt_calibration import awq_pre_quant_scale
from flux_fp4.quant.nvfp4 import fake_quantize_activation, fake_quantize_weight, quantize_weight
from flux_fp4.quant.sqnr import sqnr_db


def weight_and_rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A Linear 128 -> 96 with inputs of which three channels are forty times as large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(96, 128, generator=generator)
    rows = torch.randn(48, 128, generator=generator)
    rows[:, [5, 40, 41]] *= 40
    return weight, rows


def awq_by_hand(weight: torch.Tensor, rows: torch.Tensor, alphas: list[float]) -> torch.Tensor:
    """The grid search of AWQ as ModelOpt documents it, written out."""
    reference = rows @ weight.T
    blocks = weight.abs().unflatten(1, (-1, 16))
    mean_w = (blocks / blocks.amax(-1, keepdim=True)).flatten(1).mean(0)
    mean_x = rows.abs().mean(0)
    best, least = torch.empty(0), float("inf")
    for alpha in alphas:
        scale = (mean_x**alpha / mean_w ** (1 - alpha)).clamp(1e-4, 1e4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        output = (rows / scale) @ quantize_weight(weight * scale, "linear").dequantize().T
        loss = (output - reference).square().mean().item()
        if loss < least:
            best, least = 1 / scale, loss
    return best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("step", "alphas"), [(0.1, [i / 10 for i in range(11)]), (0.25, [0, 0.25, 0.5, 0.75, 1])]
)
def test_scale_equals_a_grid_search_by_hand(step: float, alphas: list[float], seed: int) -> None:
    weight, rows = weight_and_rows(seed)
    scale = awq_pre_quant_scale({"linear": (weight, rows)}, step)["linear"]
    assert scale.dtype == torch.float32
    db = sqnr_db(awq_by_hand(weight, rows, alphas), scale)
    assert db > 90, f"scales agree to {db:.1f} dB; a neighbouring alpha gives about 10"


def test_awq_lowers_the_output_error_of_inputs_with_outlier_channels() -> None:
    weight, rows = weight_and_rows()
    reference = rows @ weight.T
    scale = awq_pre_quant_scale({"linear": (weight, rows)})["linear"]
    plain = quantize_weight(weight, "linear").dequantize()
    smoothed = quantize_weight(weight / scale, "linear").dequantize()
    before, after = (
        sqnr_db(reference, rows @ plain.T),
        sqnr_db(reference, (rows * scale) @ smoothed.T),
    )
    assert after > before + 1.5, f"output SQNR {before:.2f} dB plain, {after:.2f} dB with AWQ"


def test_awq_lowers_the_output_error_with_quantized_inputs_too() -> None:
    weight, rows = weight_and_rows()
    reference = rows @ weight.T
    scale = awq_pre_quant_scale({"linear": (weight, rows)})["linear"]

    def w4a4_db(weight: torch.Tensor, rows: torch.Tensor) -> float:
        rounded = fake_quantize_activation(rows, rows.abs().max() / 2688)
        return sqnr_db(reference, rounded @ quantize_weight(weight, "linear").dequantize().T)

    before, after = w4a4_db(weight, rows), w4a4_db(weight / scale, rows * scale)
    assert after > before, f"output SQNR {before:.2f} dB plain, {after:.2f} dB with AWQ"


def test_fake_quantization_for_awq_is_what_gets_packed() -> None:
    weight, _ = weight_and_rows()
    weight[3] = 0
    assert torch.equal(fake_quantize_weight(weight), quantize_weight(weight, "linear").dequantize())


def test_each_linear_has_its_own_scale_and_keeps_its_weight() -> None:
    linears = {name: weight_and_rows(seed) for seed, name in enumerate(("a", "b"))}
    copies = {name: weight.clone() for name, (weight, _) in linears.items()}
    scales = awq_pre_quant_scale(linears)
    alone = awq_pre_quant_scale({"b": linears["b"]})
    assert torch.equal(scales["b"], alone["b"])
    assert not torch.equal(scales["a"], scales["b"])
    assert all(torch.equal(copies[name], linears[name][0]) for name in linears)


def test_bf16_weight_is_computed_with_in_fp32() -> None:
    weight, rows = (tensor.bfloat16() for tensor in weight_and_rows())
    scale = awq_pre_quant_scale({"linear": (weight, rows)})["linear"]
    in_fp32 = awq_pre_quant_scale({"linear": (weight.float(), rows.float())})["linear"]
    assert torch.equal(scale, in_fp32)


def test_works_in_inference_mode() -> None:
    with torch.inference_mode():
        weight, rows = weight_and_rows()
        inside = awq_pre_quant_scale({"linear": (weight, rows)})["linear"]
    assert torch.equal(inside, awq_pre_quant_scale({"linear": (weight, rows)})["linear"])


def test_modelopt_is_left_as_it_was_even_after_a_cancel(capsys: Any) -> None:
    from modelopt.torch.quantization import conversion, model_calib
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    beats = 0

    def cancel() -> None:
        nonlocal beats
        beats += 1
        if beats == 3:
            raise KeyboardInterrupt

    backends = dict(tensor_quantizer._QUANT_FUNCTIONAL_BACKENDS)
    print_rank_0 = model_calib.print_rank_0
    with pytest.raises(KeyboardInterrupt):
        awq_pre_quant_scale({"linear": weight_and_rows()}, heartbeat=cancel)
    assert beats == 3
    assert backends == tensor_quantizer._QUANT_FUNCTIONAL_BACKENDS
    assert model_calib.print_rank_0 is print_rank_0
    assert not hasattr(conversion, "print")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    weight, rows = weight_and_rows()
    rows[7, 7] = bad
    with pytest.raises(NotFiniteError, match=r"single_blocks\.3\.linear1"):
        awq_pre_quant_scale({"single_blocks.3.linear1": (weight, rows)})


@pytest.mark.parametrize("count", [0, 4])
def test_no_inputs_but_zeros_are_refused_by_name(count: int) -> None:
    weight, _ = weight_and_rows()
    with pytest.raises(CalibrationError, match=rf"'linear2' has {count} inputs"):
        awq_pre_quant_scale({"linear2": (weight, torch.zeros(count, 128))})
