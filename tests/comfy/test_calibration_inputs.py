"""Calibration samples of every variant, carried through our blocks, against ComfyUI's sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_in_process import import_comfyui
from flux_fp4.quant.calibration import CalibrationSample, embedded_samples, rectified_flow_samples
from flux_fp4.quant.flux.config import FluxConfig
from flux_fp4.quant.flux.model import unpatchify
from flux_fp4.quant.stack import run_block
from tiny_flux import TINY_VARIANTS, random_flux, save_flux
from torch import Tensor

import_comfyui()

import comfy.latent_formats  # noqa: E402
import comfy.model_management as mm  # noqa: E402
import comfy.sampler_helpers  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
from comfy_extras.nodes_ip2p import InstructPixToPixConditioning  # noqa: E402
from flux_fp4.nodes import paths  # noqa: E402
from flux_fp4.nodes.calibration import (  # noqa: E402
    CalibrationSamples,
    model_space_latents,
    prompts_of,
)
from flux_fp4.nodes.errors import ArtifactNameError, CalibrationInputError  # noqa: E402
from flux_fp4.quant.calibration_files import load_samples  # noqa: E402

import nodes  # noqa: E402

MAX_DIFFERENCE = 1e-5
"""Of the velocity, whose values are around 1, after a whole transformer in fp32."""

CPU = torch.device("cpu")


class NoiseVAE:
    """Encodes pictures ``[n, H, W, 3]`` as latents that depend on them."""

    def encode(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[1] // 8, pixels.shape[2] // 8
        seed = int(1000 * pixels.sum())
        generator = torch.Generator().manual_seed(seed % 2**31)
        return torch.randn(len(pixels), 16, height, width, generator=generator)


def text(config: FluxConfig, pooled: bool = True, **options: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(1, 6, config.context_in_dim, generator=generator)
    if pooled and config.vec_in_dim:
        options["pooled_output"] = torch.randn(1, config.vec_in_dim, generator=generator)
    return [[context, options]]


def pictures(config: FluxConfig, height: int = 5, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, config.out_channels, height, width, generator=generator)


def inpainting(config: FluxConfig) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    pixels, mask = torch.rand(2, 40, 48, 3, generator=generator), torch.zeros(1, 40, 48)
    mask[:, 5:20, 7:31] = 1
    return nodes.InpaintModelConditioning().encode(  # type: ignore[no-any-return]
        text(config), text(config), pixels, NoiseVAE(), mask
    )[0]


def control(config: FluxConfig) -> list[Any]:
    # another size than the latents: ComfyUI scales it
    pixels = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(3))
    return InstructPixToPixConditioning.execute(  # type: ignore[no-any-return]
        text(config), text(config), pixels, NoiseVAE()
    ).result[0]


def references(config: FluxConfig, method: str | None = None) -> list[Any]:
    latents = [torch.ones(1, config.out_channels, 3, 8), pictures(config, 4, 3)]
    named = {} if method is None else {"reference_latents_method": method}
    return text(config, reference_latents=latents, **named)


CASES: dict[str, tuple[str, Any]] = {
    "dev": ("flux1-dev", lambda config: text(config, guidance=2.0)),
    "dev without pooled text": ("flux1-dev", lambda config: text(config, pooled=False)),
    "dev without guidance": ("flux1-dev", lambda config: text(config, guidance=None)),
    "schnell": ("flux1-schnell", text),
    "control": ("flux1-control", control),
    "fill": ("flux1-fill", inpainting),
    "kontext": ("flux1-dev", references),
    "kontext, index": ("flux1-dev", lambda config: references(config, "index")),
    "kontext, uxo": ("flux1-dev", lambda config: references(config, "uxo")),
    "flux2": ("flux2-dev", text),
    "klein": ("flux2-klein", text),
    "flux2 with references": ("flux2-dev", references),
}


def comfy_velocity(model: Any, sample: CalibrationSample, row: int, conditioning: list) -> Tensor:
    """What ComfyUI's sampler takes from the model for row ``row`` of the pictures."""
    mm.load_models_gpu([model])
    model.pre_run()
    x = torch.zeros(2, *sample.latent.shape[1:])
    x[row] = sample.latent[0]
    conds = comfy.samplers.process_conds(
        model.model, x, {"positive": comfy.sampler_helpers.convert_cond(conditioning)}, CPU
    )
    sigma = torch.full((2,), sample.t)
    options = {"transformer_options": {}}
    (denoised,) = comfy.samplers.calc_cond_batch(
        model.model, [conds["positive"]], x, sigma, options
    )
    return ((x - denoised) / sample.t)[row : row + 1]


@pytest.mark.parametrize(("variant", "conditioning"), CASES.values(), ids=CASES.keys())
@torch.inference_mode()
def test_samples_reach_the_model_as_in_sampling(
    variant: str, conditioning: Any, tmp_path: Path
) -> None:
    config = TINY_VARIANTS[variant]
    flux, given = random_flux(config), conditioning(config)
    path = save_flux(flux, tmp_path / "tiny.safetensors", dtype=torch.float32)
    latents = model_space_latents({"samples": pictures(config)})
    samples = rectified_flow_samples(latents, prompts_of(given, latents), timesteps=2, seed=0)
    stock = comfy.sd.load_diffusion_model(str(path))
    assert stock.model.get_dtype() == torch.float32
    for index, state in enumerate(embedded_samples(samples, flux, config)):
        sample = samples.samples[index]
        tokens = sample.velocity_patches(config.patch_size).shape[1]
        text_tokens = sample.conditioning.context.shape[1]
        for name in config.block_names:
            state = run_block(flux.get_submodule(name), state)  # type: ignore[arg-type]
        patches = flux.final_layer(state.img[:, text_tokens : text_tokens + tokens], state.vec)
        actual = unpatchify(patches, *sample.latent.shape[-2:], config.patch_size)
        expected = comfy_velocity(stock, sample, index // 2, given)
        difference = (actual - expected).abs().max().item()
        assert difference <= MAX_DIFFERENCE, f"sample {index}: {difference:.1e}"


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((1, 4, 8, 8), "4 channels; FLUX latents have 16 .FLUX.1., 128 .FLUX.2."),
        ((1, 16, 1, 8, 8), r"the shape \(1, 16, 1, 8, 8\)"),
    ],
    ids=["sd15", "video"],
)
def test_latents_of_other_models_are_refused(shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(CalibrationInputError, match=text):
        model_space_latents({"samples": torch.ones(shape)})


def test_empty_latent_is_refused() -> None:
    with pytest.raises(CalibrationInputError, match="This latent is empty"):
        model_space_latents({"samples": torch.zeros(1, 128, 8, 8)})


def test_samples_are_saved_for_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {paths.MODEL_FOLDER: ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    config = TINY_VARIANTS["flux1-dev"]
    given = (text(config), {"samples": pictures(config)}, 2, 0)
    output = CalibrationSamples.execute(*given)
    assert list(tmp_path.iterdir()) == []
    saved = CalibrationSamples.execute(*given, save_as="mine")
    file = tmp_path / "samples" / "mine.samples.safetensors"
    assert load_samples(file).digest() == output.result[0].digest() == saved.result[0].digest()
    assert paths.quantized_checkpoints() == []


@pytest.mark.parametrize("name", ["../a", "/a", ".a", "a/b", "con"])
def test_hostile_names_of_samples_are_refused(name: str) -> None:
    assert "cannot be the name of a file" in str(CalibrationSamples.validate_inputs(save_as=name))
    with pytest.raises(ArtifactNameError, match="FLUX Calibration Samples"):
        paths.samples_file(name)
