"""What users build around a FLUX MODEL, as graphs in a real ComfyUI on the reference backend.

Each case runs twice: with the engine, and with ComfyUI's stock FLUX whose Linears compute what the
stored quantization stands for. Equality is not to be had: one ulp at an FP4 rounding edge moves a
value by a whole step. But a case that is dropped silently leaves the plain picture, and that is
far away.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui
from comfy_server import ComfyServer, PromptResult
from graphs import Graph, Link
from pack_import import ROOT
from safetensors.torch import load_file
from small_lora import LORA, write_small_lora
from small_model_files import TEXT_ENCODER, VAE, link_models
from small_workflow import CALIBRATION_PICTURES, write_calibration_pictures
from torch import Tensor

import_comfyui()

from flux_fp4.quant.sqnr import sqnr_db  # noqa: E402
from graph_models import (  # noqa: E402
    CONTROL,
    FILL,
    PICTURE_LATENTS,
    SMALL,
    SMALL_SVD,
    write_controlnets,
    write_engines,
    write_latents,
)

MIN_DB = 12.0
"""Smallest SQNR of latents between engine and emulation. 106 to 135 dB where no value crosses a
rounding edge; where one does, it measures 16 (DualCFG, which multiplies differences) to 89 dB."""

EFFECT_DB = 6.0
"""A case must be closer to its emulation than the picture without it is by at least this: that
measures -7 to 18 dB."""


@dataclass
class Bench:
    """The server and what was sampled on it."""

    server: ComfyServer
    sampled: dict[tuple[str, str], Tensor]
    counter: Iterator[int]

    def run(self, graph: Graph, latent: Link) -> tuple[PromptResult, Tensor]:
        """Run a graph and return its latent, empty if it failed."""
        prefix = f"graphs/{next(self.counter)}"
        graph.add("SaveLatent", samples=latent, filename_prefix=prefix)
        result = self.server.client.run(graph.nodes)
        files = sorted((self.server.base / "output").glob(f"{prefix}_*.latent"))
        latents = [load_file(file)["latent_tensor"] for file in files]
        return result, latents[0] if latents else torch.empty(0)

    def sample(self, name: str, kind: str) -> Tensor:
        """Return the latent of a case with the engine or with the emulation; each runs once."""
        if (name, kind) not in self.sampled:
            case, graph = CASES[name], Graph()
            result, latent = self.run(graph, case.build(Sampling(graph, kind, case.model)))
            assert (result.status, result.error_message) == ("success", "")
            self.sampled[name, kind] = latent
        return self.sampled[name, kind]


@pytest.fixture(scope="module")
def bench(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    base = tmp_path_factory.mktemp("graphs")
    link_models(base)
    write_small_lora(base / "models" / "loras")
    write_engines(base / "models" / "flux_fp4")
    write_controlnets(base / "models" / "controlnet")
    (base / "input").mkdir()
    write_latents(base / "input")
    write_calibration_pictures(base / "input")
    with ComfyServer(comfyui_path, base, ROOT, [ROOT / "tests" / "graph_nodes"]) as server:
        yield Bench(server, {}, itertools.count())


class Sampling:
    """The nodes that most graphs have, and the model under test."""

    def __init__(self, graph: Graph, kind: str, model: str) -> None:
        self.graph, self.kind, self.name = graph, kind, model
        self.add = graph.add
        self.clip = graph.add("CLIPLoader", clip_name=TEXT_ENCODER, type="stable_diffusion")
        self.model = self.load(model)
        self.positive = self.text("a handwritten digit three")
        self.negative = self.text("a handwritten digit eight")
        self.latent = self.empty()

    def load(self, name: str) -> Link:
        if self.kind == "engine":
            return self.add("FluxFP4LoadEngine", engine=f"{name}/sm120", backend="reference")
        return self.add("TestLoadEmulatedFlux", checkpoint=name)

    def text(self, text: str) -> Link:
        return self.add("CLIPTextEncode", text=text, clip=self.clip)

    def empty(self, width: int = 64, height: int = 64, batch: int = 1) -> Link:
        return self.add("EmptySD3LatentImage", width=width, height=height, batch_size=batch)

    def digits(self) -> Link:
        """Four pictures of digits as latents."""
        return self.add("LoadLatent", latent=PICTURE_LATENTS)

    def digit(self) -> Link:
        return self.add("LatentFromBatch", samples=self.digits(), batch_index=1, length=1)

    def pixels(self) -> Link:
        return self.add("LoadImage", image=CALIBRATION_PICTURES)

    def one_picture(self) -> Link:
        return self.add("ImageFromBatch", image=self.pixels(), batch_index=2, length=1)

    def vae(self) -> Link:
        return self.add("VAELoader", vae_name=VAE)

    def left_half(self) -> Link:
        """A mask of the left half of a picture."""
        black = self.add("SolidMask", value=0.0, width=64, height=64)
        white = self.add("SolidMask", value=1.0, width=32, height=64)
        return self.add("MaskComposite", destination=black, source=white, x=0, y=0, operation="add")

    def ksampler(self, **changes: Any) -> Link:
        inputs = {
            "model": self.model,
            "positive": self.positive,
            "negative": self.negative,
            "latent_image": self.latent,
            "seed": 5,
            "steps": 3,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        }
        return self.add("KSampler", **{**inputs, **changes})

    def advanced(self, guider: Link) -> Link:
        return self.add(
            "SamplerCustomAdvanced",
            noise=self.add("RandomNoise", noise_seed=5),
            guider=guider,
            sampler=self.add("KSamplerSelect", sampler_name="euler"),
            sigmas=self.add(
                "BasicScheduler", model=self.model, scheduler="simple", steps=3, denoise=1.0
            ),
            latent_image=self.latent,
        )

    def lora(self, strength: float = 1.0, model: Link | None = None) -> Link:
        return self.add(
            "LoraLoaderModelOnly",
            model=model or self.model,
            lora_name=LORA,
            strength_model=strength,
        )


@dataclass(frozen=True)
class Case:
    """A graph, and the case that it would be if what is special about it were ignored."""

    build: Callable[[Sampling], Link]
    without: str | None = "plain"
    model: str = SMALL


def plain(s: Sampling) -> Link:
    return s.ksampler()


def real_cfg(s: Sampling) -> Link:
    return s.ksampler(cfg=3.0)


def batch_3(s: Sampling) -> Link:
    return s.ksampler(latent_image=s.empty(batch=3))


def batch_6_with_cfg(s: Sampling) -> Link:
    return s.ksampler(latent_image=s.empty(batch=6), cfg=2.0)


def ksampler_advanced(s: Sampling) -> Link:
    inputs = {
        "model": s.model,
        "positive": s.positive,
        "negative": s.negative,
        "noise_seed": 5,
        "steps": 4,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
    }
    first = s.add(
        "KSamplerAdvanced",
        **inputs,
        latent_image=s.latent,
        add_noise="enable",
        start_at_step=0,
        end_at_step=2,
        return_with_leftover_noise="enable",
    )
    return s.add(
        "KSamplerAdvanced",
        **inputs,
        latent_image=first,
        add_noise="disable",
        start_at_step=2,
        end_at_step=10000,
        return_with_leftover_noise="disable",
    )


def basic_guider(s: Sampling) -> Link:
    return s.advanced(s.add("BasicGuider", model=s.model, conditioning=s.positive))


def cfg_guider(s: Sampling) -> Link:
    guider = s.add("CFGGuider", model=s.model, positive=s.positive, negative=s.negative, cfg=3.0)
    return s.advanced(guider)


def dual_cfg_guider(s: Sampling) -> Link:
    guider = s.add(
        "DualCFGGuider",
        model=s.model,
        cond1=s.positive,
        cond2=s.text("a handwritten digit five"),
        negative=s.negative,
        cfg_conds=2.0,
        cfg_cond2_negative=1.5,
        style="regular",
    )
    return s.advanced(guider)


def image_to_image(denoise: float) -> Callable[[Sampling], Link]:
    return lambda s: s.ksampler(latent_image=s.digit(), denoise=denoise)


def inpaint_with_mask(s: Sampling) -> Link:
    masked = s.add("SetLatentNoiseMask", samples=s.digit(), mask=s.left_half())
    return s.ksampler(latent_image=masked)


def wide(s: Sampling) -> Link:
    return s.ksampler(latent_image=s.empty(width=112, height=48))


def odd(s: Sampling) -> Link:
    cropped = s.add("LatentCrop", samples=s.empty(96, 96), width=72, height=88, x=0, y=0)
    return s.ksampler(latent_image=cropped)


def model_sampling_flux(s: Sampling) -> Link:
    model = s.add(
        "ModelSamplingFlux", model=s.model, max_shift=3.0, base_shift=2.0, width=64, height=64
    )
    return s.ksampler(model=model)


def flux_guidance(s: Sampling) -> Link:
    return s.ksampler(positive=s.add("FluxGuidance", conditioning=s.positive, guidance=30.0))


def guidance_off(s: Sampling) -> Link:
    return s.ksampler(positive=s.add("FluxDisableGuidance", conditioning=s.positive))


def reference(method: str | None = None, count: int = 1) -> Callable[[Sampling], Link]:
    def build(s: Sampling) -> Link:
        positive = s.add("ReferenceLatent", conditioning=s.positive, latent=s.digit())
        if count == 2:
            second = s.add("LatentFromBatch", samples=s.digits(), batch_index=3, length=1)
            positive = s.add("ReferenceLatent", conditioning=positive, latent=second)
        if method:
            positive = s.add(
                "FluxKontextMultiReferenceLatentMethod",
                conditioning=positive,
                reference_latents_method=method,
            )
        return s.ksampler(positive=positive)

    return build


def long_text(s: Sampling) -> Link:
    # 512 of T5 and 729 of a Redux picture
    return s.ksampler(positive=s.add("TestContextLength", conditioning=s.positive, tokens=1241))


def attention_mask(kind: str) -> Callable[[Sampling], Link]:
    def build(s: Sampling) -> Link:
        return s.ksampler(positive=s.add("TestAttentionMask", conditioning=s.positive, kind=kind))

    return build


def masked_beside_unmasked(s: Sampling) -> Link:
    masked = s.add("TestAttentionMask", conditioning=s.positive, kind="regions")
    return s.ksampler(positive=masked, negative=s.negative, cfg=2.0)


def masked_with_lora(s: Sampling) -> Link:
    masked = s.add("TestAttentionMask", conditioning=s.positive, kind="style strength 0.3")
    return s.ksampler(model=s.lora(1.0), positive=masked)


def regional_prompts(s: Sampling) -> Link:
    left = s.add(
        "ConditioningSetMask",
        conditioning=s.positive,
        mask=s.left_half(),
        strength=1.0,
        set_cond_area="default",
    )
    right = s.add(
        "ConditioningSetMask",
        conditioning=s.negative,
        mask=s.add("InvertMask", mask=s.left_half()),
        strength=1.0,
        set_cond_area="default",
    )
    both = s.add("ConditioningCombine", conditioning_1=left, conditioning_2=right)
    return s.ksampler(positive=both)


def timed_prompts(s: Sampling) -> Link:
    first = s.add("ConditioningSetTimestepRange", conditioning=s.positive, start=0.0, end=0.5)
    second = s.add("ConditioningSetTimestepRange", conditioning=s.negative, start=0.5, end=1.0)
    both = s.add("ConditioningCombine", conditioning_1=first, conditioning_2=second)
    return s.ksampler(positive=both, steps=4)


def fill(s: Sampling) -> Link:
    prepared = s.add(
        "InpaintModelConditioning",
        positive=s.positive,
        negative=s.negative,
        vae=s.vae(),
        pixels=s.one_picture(),
        mask=s.left_half(),
        noise_mask=True,
    )
    return s.ksampler(
        positive=prepared,
        negative=s.graph.output_of(prepared, 1),
        latent_image=s.graph.output_of(prepared, 2),
    )


def fill_other_picture(s: Sampling) -> Link:
    s.one_picture = lambda: s.add(  # type: ignore[method-assign]
        "ImageFromBatch", image=s.pixels(), batch_index=7, length=1
    )
    return fill(s)


def control_concat(s: Sampling) -> Link:
    prepared = s.add(
        "InstructPixToPixConditioning",
        positive=s.positive,
        negative=s.negative,
        vae=s.vae(),
        pixels=s.one_picture(),
    )
    return s.ksampler(
        positive=prepared,
        negative=s.graph.output_of(prepared, 1),
        latent_image=s.graph.output_of(prepared, 2),
    )


def control_without(s: Sampling) -> Link:
    return s.ksampler()


def controlnet(file: str, end: float = 1.0) -> Callable[[Sampling], Link]:
    def build(s: Sampling) -> Link:
        network = s.add("ControlNetLoader", control_net_name=file)
        if file.startswith("union"):
            network = s.add("SetUnionControlNetType", control_net=network, type="depth")
        applied = s.add(
            "ControlNetApplyAdvanced",
            positive=s.positive,
            negative=s.negative,
            control_net=network,
            image=s.one_picture(),
            strength=0.3,
            start_percent=0.0,
            end_percent=end,
            vae=s.vae(),
        )
        return s.ksampler(positive=applied, negative=s.graph.output_of(applied, 1))

    return build


def lora(*strengths: float) -> Callable[[Sampling], Link]:
    def build(s: Sampling) -> Link:
        model = s.model
        for strength in strengths:
            model = s.lora(strength, model)
        return s.ksampler(model=model)

    return build


def skip_layer_guidance(s: Sampling) -> Link:
    model = s.add(
        "SkipLayerGuidanceDiT",
        model=s.model,
        double_layers="1",
        single_layers="0, 2",
        scale=3.0,
        start_percent=0.0,
        end_percent=1.0,
        rescaling_scale=0.0,
    )
    return s.ksampler(model=model, cfg=2.0)


def cache(node: str) -> Callable[[Sampling], Link]:
    def build(s: Sampling) -> Link:
        model = s.add(
            node,
            model=s.model,
            reuse_threshold=3.0,
            start_percent=0.0,
            end_percent=1.0,
            verbose=False,
        )
        return s.ksampler(model=model, steps=6)

    return build


def six_steps(s: Sampling) -> Link:
    return s.ksampler(steps=6)


def first_block_cache(s: Sampling) -> Link:
    model = s.add("TestTransformerOption", model=s.model, kind="keep_first_block")
    return s.ksampler(model=model, steps=6)


def scale_rope(s: Sampling) -> Link:
    model = s.add(
        "ScaleROPE",
        model=s.model,
        scale_x=2.0,
        shift_x=0.0,
        scale_y=0.5,
        shift_y=3.0,
        scale_t=1.0,
        shift_t=0.0,
    )
    return s.ksampler(model=model)


def two_models(s: Sampling) -> Link:
    first = s.ksampler()
    return s.ksampler(model=s.load(SMALL_SVD), latent_image=first, denoise=0.6)


def beside_a_stock_model(s: Sampling) -> Link:
    stock = s.add("UNETLoader", unet_name="small_flux.safetensors", weight_dtype="default")
    first = s.ksampler(model=stock, positive=s.negative)
    return s.ksampler(latent_image=first, denoise=0.6)


def multi_gpu(s: Sampling) -> Link:
    return s.ksampler(model=s.add("MultiGPU_WorkUnits", model=s.model, max_gpus=2))


def selected_device(s: Sampling) -> Link:
    return s.ksampler(model=s.add("SelectModelDevice", model=s.model, device="cpu"))


CASES = {
    "plain": Case(plain, without=None),
    "real CFG": Case(real_cfg),
    "batch 3": Case(batch_3, without=None),
    "batch 6 with CFG": Case(batch_6_with_cfg, without=None),
    "KSamplerAdvanced": Case(ksampler_advanced),
    "BasicGuider": Case(basic_guider, without=None),
    "CFGGuider": Case(cfg_guider),
    "DualCFGGuider": Case(dual_cfg_guider),
    "image to image 0.3": Case(image_to_image(0.3)),
    "image to image 0.7": Case(image_to_image(0.7)),
    "inpaint with mask": Case(inpaint_with_mask),
    "Redux strength": Case(attention_mask("style strength 0.3")),
    "Redux strength, other size": Case(
        attention_mask("style strength 0.3, made for a larger picture")
    ),
    "attention regions": Case(attention_mask("regions")),
    "attention regions with CFG": Case(masked_beside_unmasked, without="real CFG"),
    "Redux strength with LoRA": Case(masked_with_lora, without="LoRA"),
    "wide": Case(wide, without=None),
    "odd sides": Case(odd, without=None),
    "ModelSamplingFlux": Case(model_sampling_flux),
    "FluxGuidance": Case(flux_guidance),
    "FluxDisableGuidance": Case(guidance_off),
    "reference": Case(reference()),
    "reference, uxo": Case(reference("uxo/uno"), without="reference"),
    "two references": Case(reference(count=2), without="reference"),
    "two references, index": Case(reference("index", 2), without="two references"),
    "two references, uxo": Case(reference("uxo/uno", 2), without="two references"),
    "long text": Case(long_text),
    "regional prompts": Case(regional_prompts),
    "timed prompts": Case(timed_prompts),
    "Fill, other picture": Case(fill_other_picture, None, FILL),
    "Fill": Case(fill, "Fill, other picture", FILL),
    "control model, no picture": Case(control_without, None, CONTROL),
    "control model": Case(control_concat, "control model, no picture", CONTROL),
    "ControlNet XLabs": Case(controlnet("xlabs.safetensors")),
    "ControlNet XLabs until 0.4": Case(
        controlnet("xlabs.safetensors", 0.4), without="ControlNet XLabs"
    ),
    "ControlNet union": Case(controlnet("union.safetensors")),
    "LoRA": Case(lora(1.0)),
    "LoRA, negative": Case(lora(-0.6)),
    "LoRA twice": Case(lora(0.7, 0.5)),
    "SVDQuant": Case(plain, "plain", SMALL_SVD),
    "LoRA on SVDQuant": Case(lora(1.0), "SVDQuant", SMALL_SVD),
    "SkipLayerGuidance": Case(skip_layer_guidance),
    "six steps": Case(six_steps, without=None),
    "EasyCache": Case(cache("EasyCache"), without="six steps"),
    "LazyCache": Case(cache("LazyCache"), without="six steps"),
    "first-block cache": Case(first_block_cache, without="six steps"),
    "ScaleROPE": Case(scale_rope),
    "two engines": Case(two_models),
    "beside a stock model": Case(beside_a_stock_model),
    "MultiGPU on one device": Case(multi_gpu, without=None),
    "SelectModelDevice": Case(selected_device, without=None),
}


@pytest.mark.parametrize("name", CASES)
def test_case(bench: Bench, name: str) -> None:
    actual, expected = bench.sample(name, "engine"), bench.sample(name, "emulated")
    assert actual.shape == expected.shape
    db = sqnr_db(expected, actual)
    assert db >= MIN_DB, f"{db:.1f} dB"
    without = CASES[name].without
    if without is not None:
        ignored = sqnr_db(expected, bench.sample(without, "engine"))
        assert db >= ignored + EFFECT_DB, f"{db:.1f} dB, and {ignored:.1f} dB without it"


def test_strength_zero_is_the_base_bit_for_bit(bench: Bench) -> None:
    graph = Graph()
    result, latent = bench.run(graph, lora(0.0)(Sampling(graph, "engine", SMALL)))
    assert result.status == "success"
    assert torch.equal(latent, bench.sample("plain", "engine"))


def test_base_comes_back_after_a_lora(bench: Bench) -> None:
    before = bench.sample("plain", "engine")
    bench.sample("LoRA", "engine")
    bench.sampled.pop(("plain", "engine"))
    graph = Graph()
    s = Sampling(graph, "engine", SMALL)
    # the sampler must run again: another node, same numbers
    result, after = bench.run(graph, s.ksampler(model=s.lora(0.0)))
    assert result.status == "success"
    assert torch.equal(after, before)


REFUSED = {
    "attn1_patch": "attn1_patch",
    "attn1_output_patch": "attn1_output_patch",
    "override": "replaced attention function",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_patches_inside_attention_are_refused(bench: Bench, kind: str) -> None:
    graph = Graph()
    s = Sampling(graph, "engine", SMALL)
    model = s.add("TestTransformerOption", model=s.model, kind=kind)
    result, _ = bench.run(graph, s.ksampler(model=model))
    assert result.status == "error"
    assert REFUSED[kind] in result.error_message
    assert "double_blocks.0" in result.error_message
    assert "Load Diffusion Model" in result.error_message


def test_scheduled_lora_is_refused(bench: Bench) -> None:
    graph = Graph()
    s = Sampling(graph, "engine", SMALL)
    hook = s.add("CreateHookLoraModelOnly", lora_name=LORA, strength_model=1.0)
    positive = s.add(
        "ConditioningSetProperties",
        cond_NEW=s.positive,
        hooks=hook,
        strength=1.0,
        set_cond_area="default",
    )
    result, _ = bench.run(graph, s.ksampler(positive=positive))
    assert result.status == "error"
    assert "scheduled LoRA" in result.error_message
    # and the model still works
    assert torch.equal(run_plain(bench), bench.sample("plain", "engine"))


def test_bypass_lora_is_refused(bench: Bench) -> None:
    graph = Graph()
    s = Sampling(graph, "engine", SMALL)
    model = s.add("LoraLoaderBypassModelOnly", model=s.model, lora_name=LORA, strength_model=1.0)
    result, _ = bench.run(graph, s.ksampler(model=model))
    assert result.status == "error"
    assert "bypass" in result.error_message


def test_timestep_zero_references_are_refused(bench: Bench) -> None:
    graph = Graph()
    result, _ = bench.run(graph, reference("index_timestep_zero")(Sampling(graph, "engine", SMALL)))
    assert result.status == "error"
    assert "index_timestep_zero" in result.error_message


def test_base_comes_back_after_a_mask(bench: Bench) -> None:
    before = bench.sample("plain", "engine")
    bench.sample("attention regions", "engine")
    graph = Graph()
    # the sampler must run again: another node, same numbers
    s = Sampling(graph, "engine", SMALL)
    result, after = bench.run(graph, s.ksampler(model=s.lora(0.0)))
    assert result.status == "success"
    assert torch.equal(after, before)


def run_plain(bench: Bench) -> Tensor:
    graph = Graph()
    result, latent = bench.run(graph, plain(Sampling(graph, "engine", SMALL)))
    assert result.status == "success"
    return latent
