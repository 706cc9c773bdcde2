"""Modulation computed once for all steps: the same results, and the weights pass once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui

import_comfyui()

import comfy.hooks  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402
from engine_sampling import SAMPLINGS, condition, lora_of, sample, stock_flux  # noqa: E402
from flux_fp4.nodes import modulation_table  # noqa: E402
from flux_fp4.nodes.engine_model import EngineOptions  # noqa: E402
from flux_fp4.nodes.engine_patcher import EnginePatcher  # noqa: E402
from flux_fp4.nodes.modulation_table import ModulationTable  # noqa: E402
from flux_fp4.quant.recipe import Format  # noqa: E402
from torch_engine import engine_over  # noqa: E402

LINEARS = 2 * 2 + 4
"""Modulation Linears of the small model: two per double block, one per single block."""

MODULATION = ("double_blocks.1.txt_mod.lin.weight", "single_blocks.2.modulation.lin.weight")


def engine_flux(tabled: bool, modulation: Format = "bf16") -> EnginePatcher:
    options = EngineOptions(precompute_modulation=tabled)
    return engine_over(stock_flux(), modulation=modulation, options=options)


@pytest.fixture(scope="module")
def resident() -> Any:
    return engine_flux(tabled=False)


@pytest.fixture
def tabled() -> Any:
    yield engine_flux(tabled=True)
    mm.unload_all_models()


@pytest.fixture(autouse=True)
def inference_mode() -> Any:
    with torch.inference_mode():
        yield


ALL_SAMPLINGS = SAMPLINGS | {"steps between sigmas": {"sampler": "dpm_2"}}


@pytest.mark.parametrize("case", ALL_SAMPLINGS.values(), ids=ALL_SAMPLINGS.keys())
def test_results_are_the_same_bit_for_bit(
    resident: EnginePatcher, tabled: EnginePatcher, case: dict[str, Any]
) -> None:
    assert torch.equal(sample(resident, **case), sample(tabled, **case))
    assert tabled.model.modulation.passes > 0


@pytest.mark.parametrize("stored", ["fp8", "nvfp4"])
def test_results_are_the_same_with_quantized_modulation(stored: Format) -> None:
    tabled = engine_flux(tabled=True, modulation=stored)
    assert torch.equal(sample(engine_flux(False, stored)), sample(tabled))
    assert tabled.model.modulation.passes == 1


def test_weights_pass_once_for_all_steps_and_not_again_for_another_seed(
    tabled: EnginePatcher,
) -> None:
    table: ModulationTable = tabled.model.modulation
    assert len(table.linears) == LINEARS
    sample(tabled)
    assert table.passes == 1
    sample(tabled, seed=6)
    sample(tabled, size=(6, 14))
    assert table.passes == 1
    sample(tabled, condition(seed=8))
    assert table.passes == 2
    sample(tabled, condition(seed=8, guidance=7.0))
    assert table.passes == 3
    sample(tabled)
    assert table.passes == 3


def test_noise_levels_between_steps_cost_a_pass_each(tabled: EnginePatcher) -> None:
    sample(tabled, sampler="dpm_2")
    table: ModulationTable = tabled.model.modulation
    # three steps in one pass; dpm_2 looks between sigmas in all steps but the last
    assert table.passes == 1 + 2


def test_weights_come_back_as_they_were(tabled: EnginePatcher) -> None:
    table: ModulationTable = tabled.model.modulation
    before = [dict(linear.named_parameters()) for linear in table.linears]
    sample(tabled)
    for linear, parameters in zip(table.linears, before, strict=True):
        for name, parameter in linear.named_parameters():
            assert parameter is parameters[name]


def test_tensors_of_a_run_do_not_outlive_it(tabled: EnginePatcher) -> None:
    sample(tabled)
    table: ModulationTable = tabled.model.modulation
    assert table._vec is None
    assert table._outputs == ()
    assert table._coming() == []


def test_memory_for_vectors_is_bounded(
    tabled: EnginePatcher, resident: EnginePatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modulation_table, "MAX_BYTES", 1)
    assert torch.equal(sample(resident), sample(tabled))
    assert len(tabled.model.modulation._kept) == 1
    # what was dropped is computed again
    assert tabled.model.modulation.passes == 3


def test_many_steps_are_computed_in_as_many_passes_as_memory_asks_for(
    tabled: EnginePatcher, resident: EnginePatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    table: ModulationTable = tabled.model.modulation
    outputs = sum(linear.out_features for linear in table.linears)
    vec_bytes = outputs * tabled.model.get_dtype().itemsize
    monkeypatch.setattr(modulation_table, "MAX_BYTES", 2 * vec_bytes)
    assert torch.equal(sample(resident), sample(tabled))
    # three steps, of which two fit
    assert table.passes == 2
    assert len(table._kept) == 2


def with_lora(model: Any, strength: float) -> Any:
    return comfy.sd.load_lora_for_models(model, None, lora_of(*MODULATION), strength, 0)[0]


def test_lora_on_modulation_reaches_the_table_and_leaves_it(
    resident: EnginePatcher, tabled: EnginePatcher
) -> None:
    base = sample(tabled)
    patched = sample(with_lora(tabled, 0.5))
    assert (patched - base).abs().max() > 1e-3
    assert (patched - sample(with_lora(resident, 0.5))).abs().max() <= 1e-4
    assert (sample(with_lora(tabled, -1.0)) - patched).abs().max() > 1e-3
    assert torch.equal(sample(tabled), base)


def test_scheduled_lora_on_modulation_reaches_the_table_and_leaves_it(
    resident: EnginePatcher, tabled: EnginePatcher
) -> None:
    base = sample(tabled)
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0)
    hook.need_weight_init = False
    key_map = comfy.lora.model_lora_keys_unet(stock_flux().model, {})
    hook.weights = comfy.lora.load_lora(lora_of(*MODULATION), key_map)
    group = comfy.hooks.HookGroup()
    group.add(hook)
    positive = condition(hooks=group)
    scheduled = sample(tabled.clone(), positive)
    assert (scheduled - base).abs().max() > 1e-3
    assert torch.equal(scheduled, sample(resident.clone(), positive))
    assert torch.equal(sample(tabled), base)
