"""LoRAs and other weight patches on the engine-backed MODEL, against ComfyUI's own FLUX."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui
from flux_fp4.trt_runtime.selection import Selection
from torch import Tensor

import_comfyui()

import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402
from engine_sampling import lora_of, sample, stock_flux  # noqa: E402
from flux_fp4.nodes.engine_patcher import EnginePatcher  # noqa: E402
from flux_fp4.nodes.errors import EngineWeightError, WeightChangeError  # noqa: E402
from torch_engine import engine_over, use_needs_plans  # noqa: E402

TOLERANCE = 1e-5
FACTORIZED = 2e-3
"""Factors of a computed change stop at a relative error of 0.001."""

DOUBLE = ("double_blocks.1.img_attn.qkv.weight", "double_blocks.1.txt_mlp.2.weight")
SINGLE = ("single_blocks.0.linear1.weight",)
OUTSIDE = ("double_blocks.0.img_mod.lin.weight", "img_in.weight", "final_layer.linear.weight")


@pytest.fixture(scope="module")
def stock() -> Any:
    return stock_flux()


@pytest.fixture(params=[False, True], ids=["plain", "dynamic VRAM"])
def engine(request: pytest.FixtureRequest) -> Any:
    patcher = engine_over(stock_flux(), request.param)
    yield patcher
    mm.unload_all_models()


@pytest.fixture(autouse=True)
def inference_mode() -> Any:
    with torch.inference_mode():
        yield


def with_lora(model: Any, lora: dict[str, Tensor], strength: float = 1.0) -> Any:
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def small(lora: dict[str, Tensor], factor: float = 0.1) -> dict[str, Tensor]:
    """The same LoRA, weaker: the pictures stay pictures."""
    return {k: v * factor if "up" in k or "_b" in k else v for k, v in lora.items()}


@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_lora_changes_what_it_changes_on_stock(
    stock: Any, engine: EnginePatcher, strength: float
) -> None:
    lora = small(lora_of(*DOUBLE, *SINGLE, *OUTSIDE))
    expected = sample(with_lora(stock, lora, strength))
    assert difference(sample(with_lora(engine, lora, strength)), expected) < TOLERANCE
    assert difference(sample(stock), expected) > 1e-2


def test_only_touched_blocks_take_factors(engine: EnginePatcher) -> None:
    sample(with_lora(engine, small(lora_of(*DOUBLE, *OUTSIDE))))
    adapters = engine.model.engine.selection.adapters
    assert {block: set(linears) for block, linears in adapters.items()} == {
        "double_blocks.1": {"img_attn.qkv", "txt_mlp.2"}
    }


def test_two_loras_and_one_twice(stock: Any, engine: EnginePatcher) -> None:
    first, second = small(lora_of(*DOUBLE, rank=2)), small(lora_of(*DOUBLE, *SINGLE, rank=5))

    def twice(model: Any) -> Any:
        return with_lora(with_lora(with_lora(model, first, 0.5), second, -0.4), first, 0.2)

    expected = sample(twice(stock))
    assert difference(sample(twice(engine)), expected) < TOLERANCE
    assert (
        engine.model.engine.selection.adapters["double_blocks.1"]["img_attn.qkv"].rank == 2 + 5 + 2
    )
    assert difference(sample(with_lora(stock, first, 0.7)), expected) > 1e-2


def test_base_comes_back_bit_for_bit(engine: EnginePatcher) -> None:
    before = sample(engine)
    patched = with_lora(engine, small(lora_of(*DOUBLE, *SINGLE)))
    changed = sample(patched)
    assert not torch.equal(before, changed)
    assert torch.equal(sample(engine), before)
    assert torch.equal(sample(patched), changed)
    assert torch.equal(sample(with_lora(engine, small(lora_of(*DOUBLE)), 0.0)), before)
    assert engine.model.engine.selection.adapters == {}


def test_lora_survives_unloading(engine: EnginePatcher) -> None:
    patched = with_lora(engine, small(lora_of(*DOUBLE)))
    expected = sample(patched)
    mm.unload_all_models()
    assert torch.equal(sample(patched), expected)
    del patched
    gc.collect()
    base = sample(engine)
    assert not torch.equal(base, expected)


def q_slice(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA in diffusers names, which address q alone inside of the fused qkv."""
    (up, down) = (lora[name] for name in sorted(lora, reverse=True))
    name = "transformer.transformer_blocks.1.attn.to_q"
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up[: len(up) // 3]}


def test_slice_of_a_fused_weight(stock: Any, engine: EnginePatcher) -> None:
    lora = q_slice(small(lora_of(DOUBLE[0])))
    expected = sample(with_lora(stock, lora))
    assert difference(sample(with_lora(engine, lora)), expected) < TOLERANCE
    assert difference(sample(stock), expected) > 1e-3
    factors = engine.model.engine.selection.adapters["double_blocks.1"]["img_attn.qkv"]
    width = factors.up.shape[1] // 3
    assert factors.up[:, :width].any()
    assert not factors.up[:, width:].any()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loha(weight: str, rank: int = 3) -> dict[str, Tensor]:
    rows, columns = stock_flux().model.diffusion_model.state_dict()[weight].shape
    name = "lora_unet_" + weight.removesuffix(".weight").replace(".", "_")
    return {
        f"{name}.hada_w1_a": 0.1 * random(rows, rank, seed=1),
        f"{name}.hada_w1_b": random(rank, columns, seed=2),
        f"{name}.hada_w2_a": random(rows, rank, seed=3),
        f"{name}.hada_w2_b": random(rank, columns, seed=4),
        f"{name}.alpha": torch.tensor(0.5),
    }


def lokr(weight: str) -> dict[str, Tensor]:
    rows, columns = stock_flux().model.diffusion_model.state_dict()[weight].shape
    name = "lora_unet_" + weight.removesuffix(".weight").replace(".", "_")
    return {
        f"{name}.lokr_w1": random(4, 4, seed=1),
        f"{name}.lokr_w2_a": 0.05 * random(rows // 4, 2, seed=2),
        f"{name}.lokr_w2_b": random(2, columns // 4, seed=3),
        f"{name}.alpha": torch.tensor(1.0),
    }


def dora(weight: str) -> dict[str, Tensor]:
    lora = small(lora_of(weight))
    name = "lora_unet_" + weight.removesuffix(".weight").replace(".", "_")
    base = stock_flux().model.diffusion_model.state_dict()[weight]
    norms = torch.linalg.vector_norm(base.float(), dim=0, keepdim=True)
    return {**lora, f"{name}.dora_scale": norms * 1.02}


def difference_patch(weight: str) -> dict[str, Tensor]:
    rows, columns = stock_flux().model.diffusion_model.state_dict()[weight].shape
    name = "lora_unet_" + weight.removesuffix(".weight").replace(".", "_")
    change = random(rows, 4, seed=5) @ random(4, columns, seed=6)
    return {f"{name}.diff": 0.02 * change}


KINDS = {"LoHa": loha, "LoKr": lokr, "DoRA": dora, "difference": difference_patch}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_other_adapters_are_computed_by_comfyui_and_factorized(
    stock: Any, engine: EnginePatcher, kind: Any
) -> None:
    adapter = kind(SINGLE[0])
    expected = sample(with_lora(stock, adapter, 0.8))
    assert difference(sample(stock), expected) > 1e-2
    found = difference(sample(with_lora(engine, adapter, 0.8)), expected)
    # a change of full rank is cut at 512 directions, which the small model has not
    assert found < FACTORIZED, f"{found:.2e}"


def test_dora_sees_what_the_lora_before_it_made(stock: Any, engine: EnginePatcher) -> None:
    def both(model: Any) -> Any:
        return with_lora(with_lora(model, small(lora_of(SINGLE[0], rank=6))), dora(SINGLE[0]), 0.8)

    expected = sample(both(stock))
    assert difference(sample(both(engine)), expected) < FACTORIZED
    other = with_lora(with_lora(stock, dora(SINGLE[0]), 0.8), small(lora_of(SINGLE[0], rank=6)))
    assert difference(sample(other), expected) > 5e-3  # the order matters


def test_plain_loras_stay_exact_beside_others(stock: Any, engine: EnginePatcher) -> None:
    def both(model: Any) -> Any:
        return with_lora(with_lora(model, loha(SINGLE[0])), small(lora_of(SINGLE[0], rank=6)))

    expected = sample(both(stock))
    assert difference(sample(both(engine)), expected) < FACTORIZED
    # LoHa with rank r has rank r * r
    assert engine.model.engine.selection.adapters["single_blocks.0"]["linear1"].rank == 6 + 9


def test_too_high_a_rank_says_so(engine: EnginePatcher) -> None:
    patched = engine
    for _ in range(9):
        patched = with_lora(patched, lora_of(SINGLE[0], rank=64), 0.01)
    with pytest.raises(WeightChangeError, match="rank 576 together, and an engine takes 512"):
        sample(patched)


def test_lora_of_another_model_is_refused_when_it_is_added(engine: EnginePatcher) -> None:
    lora = {k: torch.cat((v, v)) if "up" in k else v for k, v in lora_of(*SINGLE).items()}
    with pytest.raises(WeightChangeError, match=r"single_blocks\.0\.linear1.*\[1792, 128\]"):
        with_lora(engine, lora)


def test_broken_numbers_are_refused(engine: EnginePatcher) -> None:
    adapter = loha(SINGLE[0])
    name = next(iter(adapter))
    adapter[name] = torch.full_like(adapter[name], torch.nan)
    with pytest.raises(WeightChangeError, match="NaN"):
        sample(with_lora(engine, adapter))


def test_what_comfyui_cannot_apply_is_not_ignored(engine: EnginePatcher) -> None:
    adapter = loha(SINGLE[0])
    name = next(iter(adapter))
    adapter[name] = adapter[name][:-1]  # ComfyUI itself logs an error and goes on
    with pytest.raises(WeightChangeError, match="nothing in it to apply"):
        sample(with_lora(engine, adapter))


def test_changes_of_norms_are_refused(engine: EnginePatcher) -> None:
    key = "diffusion_model.double_blocks.0.img_attn.norm.key_norm.weight"
    with pytest.raises(EngineWeightError, match="key_norm"):
        engine.add_patches({key: (torch.ones(128),)})


def test_second_device_gets_an_engine_of_its_own(engine: EnginePatcher) -> None:
    def load_again(disable_dynamic: bool = False) -> EnginePatcher:
        return engine_over(stock_flux())

    engine.cached_patcher_init = (load_again, ())
    patched = with_lora(engine, small(lora_of(*DOUBLE, *OUTSIDE)))
    expected = sample(patched)
    second = patched.deepclone_multigpu(torch.device("cpu"))
    assert isinstance(second, EnginePatcher)
    assert second.model.engine is not engine.model.engine
    assert torch.equal(sample(second), expected)
    assert second.model.engine.selection.adapters.keys() == {"double_blocks.1"}
    second.detach()
    assert torch.equal(sample(patched), expected)


def test_missing_plans_are_built_before_anything_is_loaded(
    engine: EnginePatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[list[str]] = []
    plans = engine.model.engine
    progress: list[str] = []

    class Progress:
        def show(self, text: str) -> None:
            progress.append(text)

    def build(_folder: Any, selection: Selection, *_how: Any) -> None:
        assert not plans.loaded
        built.append(list(selection.adapters))

    use_needs_plans(monkeypatch, plans, lambda selection: [] if built else list(selection.adapters))
    monkeypatch.setattr("flux_fp4.trt_runtime.variant_plans.build_selected", build)
    monkeypatch.setattr("flux_fp4.nodes.built_plans.progress_of_running_node", Progress)
    sample(with_lora(engine, small(lora_of(*DOUBLE, *SINGLE))))
    assert built == [["double_blocks.1", "single_blocks.0"]]
    assert progress == [""]  # nothing stays on the sampler


def test_cancelled_build_leaves_the_model_usable(
    engine: EnginePatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sample(engine)
    patched = with_lora(engine, small(lora_of(*DOUBLE)))

    def cancel(*_arguments: Any) -> None:
        raise mm.InterruptProcessingException

    use_needs_plans(monkeypatch, engine.model.engine, lambda selection: ["a plan"])
    monkeypatch.setattr("flux_fp4.trt_runtime.variant_plans.build_selected", cancel)
    monkeypatch.setattr("flux_fp4.nodes.built_plans.progress_of_running_node", object)
    with pytest.raises(mm.InterruptProcessingException):
        sample(patched)
    monkeypatch.undo()
    assert torch.equal(sample(engine), before)
    assert not torch.equal(sample(patched), before)
