"""The engine-backed MODEL against ComfyUI's own FLUX, in one process, with torch as the engine."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui
from torch import Tensor

import_comfyui()

import comfy.hooks  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.sd  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402
from engine_sampling import condition, lora_of, sample, stock_flux  # noqa: E402
from flux_fp4.nodes.engine_model import build_engine_model  # noqa: E402
from flux_fp4.nodes.engine_patcher import EnginePatcher  # noqa: E402
from flux_fp4.nodes.errors import (  # noqa: E402
    CheckpointWeightsError,
    EngineModelError,
    EngineWeightError,
    UnsupportedByEngineError,
)
from torch_engine import TorchEngine, engine_over  # noqa: E402

# The same operations in the same order, but modulation chunks reach the block as copies.
TOLERANCE = 1e-5
CPU = torch.device("cpu")


def engine_flux(dynamic_vram: bool = False) -> EnginePatcher:
    return engine_over(stock_flux(), dynamic_vram)


@pytest.fixture(scope="module")
def stock() -> Any:
    return stock_flux()


@pytest.fixture(params=[False, True], ids=["plain", "dynamic VRAM"])
def engine(request: pytest.FixtureRequest) -> Any:
    patcher = engine_flux(dynamic_vram=request.param)
    yield patcher
    mm.unload_all_models()


@pytest.fixture(autouse=True)
def inference_mode() -> Any:
    with torch.inference_mode():
        yield


SAMPLINGS: dict[str, dict[str, Any]] = {
    "text to image": {},
    "batch 3": {"batch": 3},
    "batch 3 with cfg 2": {"batch": 3, "cfg": 2.0},
    "image to image": {
        "latent": torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2)),
        "denoise": 0.5,
    },
    "wide picture": {"size": (6, 14)},
    "odd sides": {"size": (7, 9)},
    "guidance 7": {"positive": condition(guidance=7.0)},
    "guidance off": {"positive": condition(guidance=None)},
    "long text": {"positive": condition(tokens=300)},
    "two texts": {"positive": condition(tokens=77) + condition(seed=3, tokens=154)},
    "reference picture": {
        "positive": condition(reference_latents=[torch.ones(1, 16, 10, 6)]),
    },
    "two references, uxo": {
        "positive": condition(
            reference_latents=[torch.ones(1, 16, 10, 6), torch.ones(1, 16, 4, 4)],
            reference_latents_method="uxo",
        ),
    },
}


@pytest.mark.parametrize("case", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_engine_samples_like_stock_flux(
    stock: Any, engine: EnginePatcher, case: dict[str, Any]
) -> None:
    difference = (sample(stock, **case) - sample(engine, **case)).abs().max()
    assert engine.model.engine.runs > 0
    assert difference <= TOLERANCE


def skip_layer(model: Any) -> None:
    def skip(args: dict[str, Any], _extra: dict[str, Any]) -> dict[str, Any]:
        return {"img": args["img"], "txt": args["txt"]}

    model.set_model_patch_replace(skip, "dit", "double_block", 1)


def double_a_block(model: Any) -> None:
    def run_twice(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        again = {**args, "img": extra["original_block"](args)["img"]}
        return extra["original_block"](again)

    model.set_model_patch_replace(run_twice, "dit", "single_block", 2)


def scale_rope(model: Any) -> None:
    model.set_model_rope_options(
        scale_x=1.5, shift_x=0.0, scale_y=0.5, shift_y=2.0, scale_t=1.0, shift_t=0.0
    )


def wrap_model(model: Any) -> None:
    def negate(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        return -executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", negate)


def control_residuals(model: Any) -> None:
    residual = torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(6))

    def with_control(apply: Callable[..., Tensor], args: dict[str, Any]) -> Tensor:
        control = {"input": [residual, None], "output": [None, residual]}
        return apply(args["input"], args["timestep"], **{**args["c"], "control": control})

    model.set_model_unet_function_wrapper(with_control)


CHANGES = {
    change.__name__: change
    for change in (skip_layer, double_a_block, scale_rope, wrap_model, control_residuals)
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_model_changes_work_as_on_stock_flux(
    stock: Any, engine: EnginePatcher, change: Callable[[Any], None]
) -> None:
    changed_stock, changed_engine = stock.clone(), engine.clone()
    change(changed_stock)
    change(changed_engine)
    expected = sample(changed_stock)
    assert (expected - sample(changed_engine)).abs().max() <= TOLERANCE
    assert (expected - sample(stock)).abs().max() > 1e-3  # the change changes something


def test_rotary_tables_are_computed_once_per_step(engine: EnginePatcher) -> None:
    rotary = engine.model.diffusion_model.double_blocks[0].rotary
    ids = torch.zeros(1, 20, 3)
    ids[0, :, 1] = torch.arange(20)
    pe = engine.model.diffusion_model.pe_embedder(ids)
    cos, sin = rotary(pe)
    assert rotary(pe)[0] is cos
    assert cos.shape == sin.shape == (1, 20, 64)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
    assert rotary(pe.clone())[0] is not cos
    other = weakref.ref(rotary(pe)[0])
    del pe
    del cos, sin
    gc.collect()
    assert other() is None  # nothing of a run stays


# What an engine cannot do is refused, and the message names what to do instead.


MODULATION = (
    "double_blocks.0.img_mod.lin.weight",
    "single_blocks.3.modulation.lin.weight",
    "img_in.weight",
)
INSIDE = ("double_blocks.1.txt_mlp.2.weight", "single_blocks.0.linear1.weight")


def test_lora_outside_of_the_engine_works(stock: Any, engine: EnginePatcher) -> None:
    lora = lora_of(*MODULATION)
    patched_stock, _ = comfy.sd.load_lora_for_models(stock, None, lora, 0.5, 0)
    patched_engine, _ = comfy.sd.load_lora_for_models(engine, None, lora, 0.5, 0)
    expected = sample(patched_stock)
    assert len(patched_engine.patches) == len(MODULATION)
    assert (expected - sample(patched_engine)).abs().max() <= TOLERANCE * expected.abs().max()
    base = sample(engine)
    assert (base - expected).abs().max() > 1e-3
    assert (base - sample(stock)).abs().max() <= TOLERANCE  # the LoRA is gone again


def test_change_of_an_engine_bias_is_refused(engine: EnginePatcher) -> None:
    bias = f"diffusion_model.{INSIDE[0].removesuffix('weight')}bias"
    with pytest.raises(EngineWeightError, match=r"double_blocks\.1\.txt_mlp\.2\.bias") as error:
        engine.add_patches({bias: (torch.ones(128),)})
    assert error.value.weights == (bias.removeprefix("diffusion_model."),)


def test_bypass_lora_on_engine_weights_is_refused(engine: EnginePatcher) -> None:
    with pytest.raises(EngineWeightError, match=r"double_blocks\.1\.txt_mlp\.2\.weight"):
        comfy.sd.load_bypass_lora_for_models(engine, None, lora_of(*INSIDE), 1.0, 0)


def test_every_lora_key_of_stock_flux_is_found(stock: Any, engine: EnginePatcher) -> None:
    expected = comfy.lora.model_lora_keys_unet(stock.model, {})
    assert comfy.lora.model_lora_keys_unet(engine.model, {}) == expected


def scheduled_lora(*weights: str) -> Any:
    key_map = comfy.lora.model_lora_keys_unet(stock_flux().model, {})
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0)
    hook.need_weight_init = False
    hook.weights = comfy.lora.load_lora(lora_of(*weights), key_map)
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return group


def test_scheduled_lora_outside_of_the_engine_works(stock: Any, engine: EnginePatcher) -> None:
    positive = condition(hooks=scheduled_lora(*MODULATION))
    expected = sample(stock.clone(), positive)
    assert (expected - sample(engine.clone(), positive)).abs().max() <= 1e-4
    assert (expected - sample(stock)).abs().max() > 1e-3


def test_scheduled_lora_on_engine_weights_is_refused(engine: EnginePatcher) -> None:
    with pytest.raises(EngineWeightError, match="scheduled LoRA"):
        sample(engine.clone(), condition(hooks=scheduled_lora(*INSIDE)))


def test_merging_and_saving_are_refused(engine: EnginePatcher) -> None:
    with pytest.raises(EngineModelError, match="merged"):
        engine.get_key_patches("diffusion_model.")
    with pytest.raises(EngineModelError, match="saved"):
        engine.state_dict_for_saving()


def attention_patch(model: Any) -> None:
    model.set_model_attn1_patch(lambda q, k, v, **_: {"q": q, "k": k, "v": v})


def attention_output_patch(model: Any) -> None:
    model.set_model_attn1_output_patch(lambda out, _options: out)


def attention_override(model: Any) -> None:
    options = model.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda function, *args, **kw: function(*args, **kw)


REFUSED = {
    change.__name__: change
    for change in (attention_patch, attention_output_patch, attention_override)
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED.keys())
def test_changes_inside_attention_are_refused(
    engine: EnginePatcher, change: Callable[[Any], None]
) -> None:
    changed = engine.clone()
    change(changed)
    with pytest.raises(UnsupportedByEngineError, match=r"double_blocks\.0") as error:
        sample(changed)
    assert error.value.block == "double_blocks.0"


def test_attention_mask_is_refused(engine: EnginePatcher) -> None:
    mask = torch.zeros(1, 93, 93)
    positive = condition(attention_mask=mask, attention_mask_img_shape=(4, 4))
    with pytest.raises(UnsupportedByEngineError, match="attention mask"):
        sample(engine, positive)


def test_zero_timestep_references_are_refused(engine: EnginePatcher) -> None:
    positive = condition(
        reference_latents=[torch.ones(1, 16, 4, 4)], reference_latents_method="index_timestep_zero"
    )
    with pytest.raises(UnsupportedByEngineError, match="index_timestep_zero"):
        sample(engine, positive)


def test_wrong_weights_are_refused_by_name(engine: EnginePatcher) -> None:
    weights = dict(engine.model.diffusion_model.named_parameters())
    weights.pop("img_in.bias")
    model = engine.model
    config, checkpoint = model.model_config.unet_config, model.checkpoint
    with pytest.raises(CheckpointWeightsError, match=r"img_in\.bias") as error:
        build_engine_model(config, weights, model.engine, {}, checkpoint, 77, CPU)
    assert error.value.missing == ["img_in.bias"]
    weights["img_in.bias"] = torch.zeros(128)
    weights["img_in.lora"] = torch.zeros(1)
    with pytest.raises(CheckpointWeightsError, match=r"img_in\.lora"):
        build_engine_model(config, weights, model.engine, {}, checkpoint, 77, CPU)


# Memory management sees the truth, and frees it.


def torch_bytes(patcher: EnginePatcher) -> int:
    return sum(weight.nbytes for weight in patcher.model.parameters())


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
    many = torch_bytes(engine) + 1
    assert loaded.model_unload(many) is True  # torch alone cannot free that much
    assert not engine.model.engine.loaded
    assert engine.loaded_size() == 0
    mm.current_loaded_models.remove(loaded)


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
    assert required([2, 16, 8, 8]) == 2 * base
    assert required([1, 16, 7, 7]) == base  # odd sides are padded to whole patches
    text = required([1, 16, 8, 8], cond_shapes={"c_crossattn": [torch.Size([1, 300, 768])]})
    reference = required([1, 16, 8, 8], cond_shapes={"ref_latents": [[1, 16, 64]]})
    assert text > base
    assert reference == required([1, 16, 8, 16])


def test_dropped_model_leaves_no_engine_behind() -> None:
    patcher = engine_flux()
    sample(patcher)
    plans = weakref.ref(patcher.model.engine)
    del patcher
    mm.cleanup_models()
    assert plans() is None  # by reference counting alone: no cycles, no delay


def test_config_looks_like_stock(stock: Any, engine: EnginePatcher) -> None:
    ours, theirs = engine.model.model_config.unet_config, stock.model.model_config.unet_config
    assert {key: ours[key] for key in theirs} == theirs
    params, stock_params = (m.model.diffusion_model.params for m in (engine, stock))
    assert params == stock_params
    assert copy.copy(params).depth == len(engine.model.diffusion_model.double_blocks)
