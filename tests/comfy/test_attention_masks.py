"""Attention masks on an engine-backed MODEL against ComfyUI's own FLUX; torch is the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui
from torch import Tensor

import_comfyui()

import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402
from engine_sampling import condition, lora_of, sample, stock_flux  # noqa: E402
from flux_fp4.nodes.attention_masks import LOWEST, additive  # noqa: E402
from flux_fp4.nodes.engine_patcher import EnginePatcher  # noqa: E402
from flux_fp4.nodes.errors import UnsupportedByEngineError  # noqa: E402
from torch_engine import engine_over, use_needs_plans  # noqa: E402

TOLERANCE = 1e-5
TOKENS = 77 + 16
"""Text, and a picture of 4 x 4."""


@pytest.fixture(scope="module")
def stock() -> Any:
    return stock_flux()


@pytest.fixture
def engine() -> Any:
    yield engine_over(stock_flux())
    mm.unload_all_models()


@pytest.fixture(autouse=True)
def inference_mode() -> Any:
    with torch.inference_mode():
        yield


def random_mask(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)) * 2


def masked(mask: Tensor, seed: int = 0, **options: Any) -> list[Any]:
    return condition(seed=seed, attention_mask=mask, attention_mask_img_shape=(4, 4), **options)


MASKS = {
    "numbers": random_mask(1, TOKENS, TOKENS),
    "numbers without batch": random_mask(TOKENS, TOKENS),
    "numbers with heads": random_mask(1, 1, TOKENS, TOKENS),
    "booleans": random_mask(1, TOKENS, TOKENS) > -1,
    "minus infinity": random_mask(1, TOKENS, TOKENS).masked_fill(
        random_mask(TOKENS, TOKENS) > 2, -torch.inf
    ),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks_act_as_in_stock_flux(stock: Any, engine: EnginePatcher, mask: Tensor) -> None:
    expected = sample(stock, masked(mask))
    assert (sample(engine, masked(mask)) - expected).abs().max() <= TOLERANCE
    assert (sample(stock) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("case", [{"batch": 3}, {"cfg": 2.0}, {"size": (6, 14)}])
def test_batches_cfg_and_other_sizes(
    stock: Any, engine: EnginePatcher, case: dict[str, Any]
) -> None:
    positive = masked(random_mask(1, TOKENS, TOKENS))
    difference = sample(engine, positive, **case) - sample(stock, positive, **case)
    assert difference.abs().max() <= TOLERANCE


def test_two_texts_of_which_one_is_masked(stock: Any, engine: EnginePatcher) -> None:
    positive = masked(random_mask(1, TOKENS, TOKENS)) + condition(seed=3)
    assert (sample(engine, positive) - sample(stock, positive)).abs().max() <= TOLERANCE


def test_mask_beside_a_lora(stock: Any, engine: EnginePatcher) -> None:
    weights = lora_of("double_blocks.1.img_attn.qkv.weight")
    positive = masked(random_mask(1, TOKENS, TOKENS))
    expected, actual = (
        sample(comfy.sd.load_lora_for_models(model, None, weights, 0.2, 0)[0], positive)
        for model in (stock, engine)
    )
    # the engine adds the factors beside the weight, stock FLUX to the weight
    assert (actual - expected).abs().max() <= 10 * TOLERANCE


def test_plain_plans_come_back_a_sampling_after_the_last_mask(engine: EnginePatcher) -> None:
    before, plans = sample(engine), engine.model.engine
    assert not plans.selection.masked
    sample(engine, masked(random_mask(1, TOKENS, TOKENS)))
    assert plans.selection.masked
    # only the sampling after this one knows that it was without a mask
    assert (sample(engine) - before).abs().max() <= TOLERANCE
    assert plans.selection.masked
    assert torch.equal(sample(engine), before)
    assert not plans.selection.masked


def test_missing_plans_are_built_when_the_first_mask_comes(
    engine: EnginePatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[list[str]] = []

    class Progress:
        def show(self, text: str) -> None:
            assert text == ""

    names = list(engine.model.plan_linears)
    use_needs_plans(
        monkeypatch,
        engine.model.engine,
        lambda selection: [
            selection.name_of(name) for name in names if selection.masked and not built
        ],
    )
    monkeypatch.setattr(
        "flux_fp4.trt_runtime.variant_plans.build_selected",
        lambda _folder, selection, *_: built.append([selection.name_of(n) for n in names]),
    )
    monkeypatch.setattr("flux_fp4.nodes.built_plans.progress_of_running_node", Progress)
    sample(engine, masked(random_mask(1, TOKENS, TOKENS)))
    assert built == [[f"{name}.mask" for name in names]]


def test_mask_of_a_run_does_not_outlive_it(engine: EnginePatcher) -> None:
    sample(engine, masked(random_mask(1, TOKENS, TOKENS)))
    assert engine.model.attention_masks._mask is None


@pytest.mark.parametrize("shape", [(1, 4, 93, 93), (1, 92, 92), (1, 93, 92)])
def test_other_masks_are_refused(engine: EnginePatcher, shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedByEngineError) as error:
        sample(engine, masked(torch.zeros(shape)))
    assert str(list(shape)) in str(error.value)
    assert "93" in str(error.value)


def test_token_that_sees_nothing_gets_an_average_and_not_nan() -> None:
    mask = additive(torch.zeros(3, 3, dtype=torch.bool), torch.bfloat16, 3)
    assert mask.shape == (1, 1, 3, 3)
    assert (mask == torch.tensor(LOWEST).bfloat16()).all()
    scores = torch.randn(1, 2, 3, 3).bfloat16() + mask
    assert scores.softmax(-1).isfinite().all()


def test_mask_by_key_is_the_same_for_all_rows() -> None:
    row = random_mask(1, 1, 5)
    assert torch.equal(additive(row, torch.float32, 5), row[:, None].expand(1, 1, 5, 5))
