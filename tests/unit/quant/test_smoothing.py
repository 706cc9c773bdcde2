from __future__ import annotations

import pytest
import torch
from flux_fp4.quant.nvfp4 import fake_quantize_activation, fake_quantize_weight
from flux_fp4.quant.smoothing import best_scale
from flux_fp4.quant.sqnr import sqnr_db
from torch import Tensor
from torch.nn import functional

N, K, ROWS = 192, 256, 128


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chosen(weight: Tensor, rows: Tensor, awq: Tensor | None = None) -> Tensor:
    awq = torch.ones(K) if awq is None else awq
    return best_scale("w", weight, rows, rows.abs().amax(0), awq, "max", lambda: None)


def output_db(weight: Tensor, x: Tensor, scale: Tensor) -> float:
    scaled = x * scale.float()
    rounded = fake_quantize_activation(scaled, scaled.abs().amax() / (6 * 448))
    actual = functional.linear(rounded, fake_quantize_weight(weight / scale.float()))
    return sqnr_db(functional.linear(x, weight), actual)


def with_outliers() -> tuple[Tensor, Tensor]:
    # the last channel of each block of 16 is large in the input and small in the weight
    size = torch.ones(K)
    size[15::16] = 40.0
    return random(N, K, seed=1) / size, random(2 * ROWS, K, seed=2) * size


def test_outlier_channels_are_smoothed() -> None:
    weight, x = with_outliers()
    scale = chosen(weight, x[:ROWS])
    others = x[ROWS:]
    smoothed, plain = (output_db(weight, others, s) for s in (scale, torch.ones(K)))
    assert smoothed > plain + 3, f"{smoothed:.1f} dB smoothed, {plain:.1f} dB plain"
    assert scale.dtype == torch.bfloat16
    assert scale.shape == (K,)
    assert (scale > 0).all()


def test_nothing_is_smoothed_where_nothing_helps() -> None:
    weight, x = random(N, K, seed=1), random(ROWS, K, seed=2)
    assert torch.equal(chosen(weight, x), torch.ones(K, dtype=torch.bfloat16))


def test_harmful_proposal_is_not_taken() -> None:
    weight, x = random(N, K, seed=1), random(ROWS, K, seed=2)
    harmful = random(K, seed=3).mul(2).exp()
    assert output_db(weight, x, harmful) < output_db(weight, x, torch.ones(K)) - 3
    assert torch.equal(chosen(weight, x, harmful), torch.ones(K, dtype=torch.bfloat16))


def test_good_proposal_is_taken() -> None:
    weight, x = with_outliers()
    proposal = torch.ones(K)
    proposal[15::16] = 1 / 40
    taken = chosen(weight, x[:ROWS], proposal)
    found, best = (output_db(weight, x[:ROWS], s) for s in (taken, proposal.bfloat16()))
    assert found >= best - 0.01, f"{found:.2f} dB, proposal {best:.2f} dB"


@pytest.mark.parametrize("dead", ["input", "weight", "both"])
def test_unused_channels_do_not_disturb_the_others(dead: str) -> None:
    weight, x = with_outliers()
    if dead != "weight":
        x[:, 3] = 0
    if dead != "input":
        weight[:, 3] = 0
    scale = chosen(weight, x[:ROWS])
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    smoothed, plain = (output_db(weight, x[ROWS:], s) for s in (scale, torch.ones(K)))
    assert smoothed > plain + 3, f"{smoothed:.1f} dB smoothed, {plain:.1f} dB plain"


def test_cancel_comes_between_tries() -> None:
    weight, x = with_outliers()
    calls = []

    def cancel() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        best_scale("w", weight, x, x.abs().amax(0), torch.ones(K), "mse", cancel)
