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
from engine_sampling import SAMPLINGS, condition, lora_of, sample, stock_flux  # noqa: E402
from flux_fp4.nodes.engine_model import EngineOptions, build_engine_model  # noqa: E402
from flux_fp4.nodes.engine_patcher import EnginePatcher  # noqa: E402
from flux_fp4.nodes.errors import (  # noqa: E402
    CheckpointWeightsError,
    EngineModelError,
    EngineWeightError,
    UnsupportedByEngineError,
)
from torch_engine import engine_over  # noqa: E402

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


SIZES_AND_TEXTS: dict[str, dict[str, Any]] = {
    "wide picture": {"size": (6, 14)},
    "odd sides": {"size": (7, 9)},
    "guidance 7": {"positive": condition(guidance=7.0)},
    "long text": {"positive": condition(tokens=300)},
    "two references, uxo": {
        "positive": condition(
            reference_latents=[torch.ones(1, 16, 10, 6), torch.ones(1, 16, 4, 4)],
            reference_latents_method="uxo",
        ),
    },
}
ALL_SAMPLINGS = SAMPLINGS | SIZES_AND_TEXTS


@pytest.mark.parametrize("case", ALL_SAMPLINGS.values(), ids=ALL_SAMPLINGS.keys())
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
        build_engine_model(config, weights, model.engine, {}, checkpoint, 77, CPU, EngineOptions())
    assert error.value.missing == ["img_in.bias"]
    weights["img_in.bias"] = torch.zeros(128)
    weights["img_in.lora"] = torch.zeros(1)
    with pytest.raises(CheckpointWeightsError, match=r"img_in\.lora"):
        build_engine_model(config, weights, model.engine, {}, checkpoint, 77, CPU, EngineOptions())


def test_config_looks_like_stock(stock: Any, engine: EnginePatcher) -> None:
    ours, theirs = engine.model.model_config.unet_config, stock.model.model_config.unet_config
    assert {key: ours[key] for key in theirs} == theirs
    params, stock_params = (m.model.diffusion_model.params for m in (engine, stock))
    assert params == stock_params
    assert copy.copy(params).depth == len(engine.model.diffusion_model.double_blocks)
