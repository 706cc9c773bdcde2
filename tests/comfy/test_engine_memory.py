"""ComfyUI's memory management over an engine-backed MODEL, and weights that take turns."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui

import_comfyui()

import comfy.model_management as mm  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
from engine_sampling import lora_of, sample, stock_flux  # noqa: E402
from flux_fp4.nodes.engine_model import EngineOptions  # noqa: E402
from flux_fp4.nodes.engine_patcher import EnginePatcher  # noqa: E402
from torch_engine import TorchEngine, engine_over  # noqa: E402

CPU = torch.device("cpu")
TOLERANCE = 1e-5
ALL_ON_GPU = EngineOptions(precompute_modulation=False)


@pytest.fixture(scope="module")
def stock() -> Any:
    return stock_flux()


@pytest.fixture(
    params=[
        (False, ALL_ON_GPU),
        (True, ALL_ON_GPU),
        (False, EngineOptions()),
        (True, EngineOptions()),
    ],
    ids=["plain", "dynamic VRAM", "plain, tabled", "dynamic VRAM, tabled"],
)
def engine(request: pytest.FixtureRequest) -> Any:
    dynamic_vram, options = request.param
    yield engine_over(stock_flux(), dynamic_vram, options=options)
    mm.unload_all_models()


@pytest.fixture(autouse=True)
def inference_mode() -> Any:
    with torch.inference_mode():
        yield


def torch_bytes(patcher: EnginePatcher) -> int:
    """Weights that ComfyUI may have on the GPU."""
    every = sum(weight.nbytes for weight in patcher.model.parameters())
    table = patcher.model.modulation
    return every - sum(p.nbytes for m in (table.linears if table else ()) for p in m.parameters())


def test_size_counts_engine_and_torch_weights(stock: Any, engine: EnginePatcher) -> None:
    assert engine.model_size() == torch_bytes(engine) + TorchEngine.weight_bytes
    # stock's own blocks are in the engine: what torch holds has to be less
    assert torch_bytes(engine) < stock.model_size()
    assert engine.loaded_size() == 0
    sample(engine)
    assert engine.loaded_size() == engine.model_size()
    assert engine.clone().model_size() == engine.model_size()


def test_unload_frees_the_engine_and_the_next_run_loads_it(engine: EnginePatcher) -> None:
    plans = engine.model.engine
    first = sample(engine)
    assert (plans.loads, plans.unloads) == (1, 0)
    mm.unload_all_models()
    assert (plans.loads, plans.unloads) == (1, 1)
    assert engine.loaded_size() == 0
    assert torch.equal(sample(engine), first)
    assert (plans.loads, plans.unloads) == (2, 1)


def test_clones_share_the_loaded_engine(engine: EnginePatcher) -> None:
    sample(engine)
    clone = engine.clone()
    sample(clone)
    del clone
    gc.collect()
    sample(engine)
    assert (engine.model.engine.loads, engine.model.engine.unloads) == (1, 0)


def test_partial_load_offloads_torch_weights_only(stock: Any, engine: EnginePatcher) -> None:
    budget = TorchEngine.weight_bytes + torch_bytes(engine) // 2
    mm.load_models_gpu([engine])
    engine.detach()
    engine.partially_load(CPU, extra_memory=budget)
    assert engine.model.engine.loaded
    assert engine.model.model_lowvram
    assert TorchEngine.weight_bytes < engine.loaded_size() < engine.model_size()
    more = engine.partially_load(CPU, extra_memory=engine.model_size())
    assert more > 0
    assert engine.loaded_size() == engine.model_size()
    assert (sample(engine) - sample(stock)).abs().max() <= TOLERANCE


def test_partial_unload_frees_torch_weights_first(engine: EnginePatcher) -> None:
    sample(engine)
    loaded = next(m for m in mm.current_loaded_models if m.model is engine)
    few = torch_bytes(engine) // 4
    assert loaded.model_unload(few) is False  # still loaded, with less in torch
    assert engine.model.engine.loaded
    assert TorchEngine.weight_bytes < engine.loaded_size() <= engine.model_size() - few


def test_partial_unload_then_evicts_plans_and_the_next_run_brings_them_back(
    engine: EnginePatcher,
) -> None:
    first, plans = sample(engine), engine.model.engine
    loaded = next(m for m in mm.current_loaded_models if m.model is engine)
    many = torch_bytes(engine) + TorchEngine.weight_bytes // 2
    assert loaded.model_unload(many) is False
    assert plans.loaded
    assert 0 < plans.resident_bytes <= TorchEngine.weight_bytes // 2
    assert engine.loaded_size() == plans.resident_bytes
    assert torch.equal(sample(engine), first)
    assert engine.loaded_size() == engine.model_size()
    assert (plans.loads, plans.unloads) == (1, 0)


def test_more_than_there_is_to_free_unloads_the_model(engine: EnginePatcher) -> None:
    sample(engine)
    loaded = next(m for m in mm.current_loaded_models if m.model is engine)
    # one place for a plan cannot be evicted
    assert loaded.model_unload(engine.loaded_size() - 1) is True
    assert not engine.model.engine.loaded
    assert engine.loaded_size() == 0
    mm.current_loaded_models.remove(loaded)


def test_little_memory_lets_plans_take_turns(stock: Any, engine: EnginePatcher) -> None:
    plans, budget = engine.model.engine, TorchEngine.weight_bytes // 3
    engine.partially_load(CPU, extra_memory=budget)
    assert plans.resident_bytes <= budget
    assert engine.loaded_size() <= budget
    assert engine.model.model_lowvram
    assert engine.partially_load(CPU, extra_memory=2 * engine.model_size()) > 0
    assert engine.loaded_size() == engine.model_size()
    assert not engine.model.model_lowvram
    assert (sample(engine) - sample(stock)).abs().max() <= TOLERANCE


def test_users_limit_is_the_engine_s_size(stock: Any) -> None:
    limit = TorchEngine.weight_bytes // 2
    engine = engine_over(stock_flux(), options=EngineOptions(engine_limit=limit))
    assert engine.model_size() == torch_bytes(engine) + limit
    assert (sample(engine) - sample(stock)).abs().max() <= TOLERANCE
    assert engine.model.engine.resident_bytes == limit
    assert engine.loaded_size() == engine.model_size()
    assert not engine.model.model_lowvram


def test_failed_load_leaves_nothing_loaded(
    engine: EnginePatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(_device: torch.device) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine.model.engine, "load", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        sample(engine)
    assert engine.loaded_size() == 0
    assert not engine.model.engine.loaded
    monkeypatch.undo()
    sample(engine)


def test_memory_required_counts_every_token(engine: EnginePatcher) -> None:
    required = engine.model.memory_required
    base = required([1, 16, 8, 8])
    assert base > engine.model.engine.activation_bytes(1, 16, 77)
    table = engine.model.modulation
    fixed = table.working_bytes if table else 0
    assert required([2, 16, 8, 8]) - fixed == 2 * (base - fixed)
    assert required([1, 16, 7, 7]) == base  # odd sides are padded to whole patches
    text = required([1, 16, 8, 8], cond_shapes={"c_crossattn": [torch.Size([1, 300, 768])]})
    reference = required([1, 16, 8, 8], cond_shapes={"ref_latents": [[1, 16, 64]]})
    assert text > base
    assert reference == required([1, 16, 8, 16])


def test_dropped_model_leaves_no_engine_behind() -> None:
    patcher = engine_over(stock_flux())
    sample(patcher)
    plans = weakref.ref(patcher.model.engine)
    del patcher
    mm.cleanup_models()
    assert plans() is None  # by reference counting alone: no cycles, no delay


# A device with a budget: ComfyUI decides, the engine obeys.

DEVICE = torch.device("cpu:0")
"""Not equal to ``cpu``, for which ComfyUI manages nothing, and tensors can be there."""

MB = 1_000_000


class Budget:
    """Stands for the memory of a GPU: what is loaded is not free."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.models: list[comfy.model_patcher.ModelPatcher] = []

    @property
    def used(self) -> float:
        # clones share a model; ComfyUI's own list lacks a model while it is being loaded
        return sum({id(m.model): m.loaded_size() for m in self.models}.values())

    def free(self, _device: Any = None, torch_free_too: bool = False) -> Any:
        left = self.size - self.used
        return (left, 0) if torch_free_too else left

    def engine(self) -> EnginePatcher:
        engine = engine_over(stock_flux())
        engine.load_device = DEVICE
        self.models.append(engine)
        return engine

    def other_model(self, size: int) -> comfy.model_patcher.ModelPatcher:
        module = torch.nn.Linear(size // 4, 1, bias=False)
        self.models.append(comfy.model_patcher.ModelPatcher(module, DEVICE, CPU))
        return self.models[-1]


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> Any:
    budget = Budget(8 * MB)
    monkeypatch.setattr(mm, "get_free_memory", budget.free)
    monkeypatch.setattr(mm, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(mm, "extra_reserved_memory", lambda: 0)
    monkeypatch.setattr(mm, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(mm, "lowvram_available", True)
    monkeypatch.setattr(mm, "vram_state", mm.VRAMState.NORMAL_VRAM)
    yield budget
    mm.unload_all_models()


def test_another_model_evicts_plans_first_and_sampling_brings_them_back(
    stock: Any, budget: Budget
) -> None:
    engine, other = budget.engine(), budget.other_model(3 * MB)
    plans = engine.model.engine
    mm.load_models_gpu([engine])
    assert engine.loaded_size() == engine.model_size()
    mm.load_models_gpu([other])
    assert plans.loaded
    assert 0 < plans.resident_bytes < TorchEngine.weight_bytes
    assert budget.used <= budget.size
    mm.load_models_gpu([engine])
    assert engine.loaded_size() == engine.model_size()
    assert budget.used <= budget.size
    assert (sample(engine) - sample(stock)).abs().max() <= TOLERANCE
    assert (plans.loads, plans.unloads) == (1, 0)


def test_a_model_that_needs_all_unloads_the_engine(budget: Budget) -> None:
    engine, other = budget.engine(), budget.other_model(7 * MB)
    mm.load_models_gpu([engine])
    mm.load_models_gpu([other])
    assert not engine.model.engine.loaded
    assert engine.loaded_size() == 0
    assert budget.used <= budget.size


@pytest.mark.parametrize("megabytes", [1, 2, 4, 6])
def test_a_small_device_lets_plans_take_turns(stock: Any, budget: Budget, megabytes: int) -> None:
    budget.size = megabytes * MB
    engine = budget.engine()
    mm.load_models_gpu([engine])
    assert engine.model.engine.loaded
    assert 0 < engine.model.engine.resident_bytes < TorchEngine.weight_bytes or megabytes == 6
    # one place for a plan is the least that an engine takes
    assert budget.used <= max(budget.size, TorchEngine.weight_bytes // 10)
    assert (sample(engine) - sample(stock)).abs().max() <= TOLERANCE


def test_a_clone_with_a_lora_stays_within_the_budget(budget: Budget) -> None:
    engine = budget.engine()
    mm.load_models_gpu([engine])
    weights = lora_of("double_blocks.1.img_attn.qkv.weight")
    patched = comfy.sd.load_lora_for_models(engine, None, weights, 0.2, 0)[0]
    mm.load_models_gpu([patched])
    assert budget.used <= budget.size
    assert engine.model.engine.selection.adapters
    mm.load_models_gpu([engine])
    assert not engine.model.engine.selection.adapters
    assert len(mm.current_loaded_models) == 1
