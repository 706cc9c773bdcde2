"""What the tests of whole graphs load: engines of several checkpoints, ControlNets, latents."""

from __future__ import annotations

from pathlib import Path

import comfy.ldm.flux.controlnet
import comfy.ops
import comfy.utils
import torch
from flux_fp4.quant.calibration import Conditioning, rectified_flow_samples
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.recipe import QuantizeOptions
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile
from quantize_tiny import quantize, with_recipe
from safetensors.torch import save_file
from small_model.autoencoder import latents_of
from small_model.conditioning import encode_prompts
from small_model.digits import PROMPTS, load_ink
from small_model_files import DATA, DIFFUSION_MODEL, text_encoder
from tiny_flux import TINY, ignore_progress, random_flux, random_samples, save_flux
from torch import Tensor

SMALL, SMALL_SVD, FILL, CONTROL = "small", "small-svdquant", "fill", "control"
SPEC = BuildSpec(
    profile=ShapeProfile(
        max_batch=2,
        min_img_tokens=4,
        opt_img_tokens=64,
        max_img_tokens=256,
        min_txt_tokens=1,
        opt_txt_tokens=77,
        max_txt_tokens=1300,
    )
)
"""Two pictures at once, so batches of 3 and 6 are split; a text as long as Redux makes it."""

PICTURE_LATENTS = "digits.latent"
_TEXT = {"context_in_dim": 768, "vec_in_dim": 768}


def write_engines(folder: Path, names: tuple[str, ...] = (SMALL, SMALL_SVD, FILL, CONTROL)) -> None:
    """Quantize, export and build into a model folder ``flux_fp4``."""
    recipes = {SMALL_SVD: "nvfp4-svdquant-r16"}
    for name in names:
        options = with_recipe(recipes.get(name, "nvfp4-max"), fp8_attention=False)
        path = folder / name / f"{name}.safetensors"
        if name in (SMALL, SMALL_SVD):
            _quantize_small(path, options)
        else:
            _quantize_tiny(path, options, in_channels=96 if name == FILL else 32)
        export_blocks(path, ignore_progress)
        build_engine(path.parent, SPEC, ignore_progress)


def _quantize_small(path: Path, options: QuantizeOptions) -> None:
    context, pooled = encode_prompts(text_encoder(), PROMPTS)
    ink, labels = load_ink()
    prompts = [Conditioning(context[label][None], pooled[label][None], 3.5) for label in labels[:4]]
    samples = rectified_flow_samples(latents_of(ink)[:4], prompts, 2, 0)
    quantize(DATA / DIFFUSION_MODEL, path, options, samples)


def _quantize_tiny(path: Path, options: QuantizeOptions, in_channels: int) -> None:
    config = TINY.model_copy(update={**_TEXT, "in_channels": in_channels})
    path.parent.mkdir(parents=True)
    source = save_flux(random_flux(config), path.parent / "source.safetensors")
    quantize(source, path, options, random_samples(config))


def write_latents(input_folder: Path) -> Tensor:
    """Store four digits as what `LoadLatent` reads, and return them."""
    ink, _ = load_ink()
    latents = latents_of(ink)[:4].contiguous()
    # the marker of ComfyUI's current format: values are stored as the sampler sees them
    marker = {"latent_format_version_0": torch.tensor([])}
    save_file({"latent_tensor": latents, **marker}, input_folder / PICTURE_LATENTS)
    return latents


def write_controlnets(folder: Path) -> None:
    """Write random ControlNets in the layouts of XLabs and InstantX, which has modes ("union")."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_xlabs(), folder / "xlabs.safetensors")
    save_file(_instantx_union(), folder / "union.safetensors")


_SIZES = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 768,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 1,
    "depth": 2,
    "axes_dim": [16, 56, 56],
    "theta": 10_000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}


_FLUX2_NAMES = (
    "linear_in",
    "linear_out",
    "to_qkv_mlp_proj",
    "single_transformer_blocks.0.attn.to_out",
)
"""Further names that the map has for the same tensors."""


def _random_controlnet(**options: object) -> dict[str, Tensor]:
    network = comfy.ldm.flux.controlnet.ControlNetFlux(
        **_SIZES, **options, operations=comfy.ops.disable_weight_init, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(3)
    state = {}
    for name, value in network.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.1
        state[name] = 1 + 0.1 * noise if ".norm." in name else scale * noise
    return state


def _xlabs() -> dict[str, Tensor]:
    state = _random_controlnet(depth_single_blocks=0)
    # files have the older names of these weights
    return {
        name.replace("_norm.weight", "_norm.scale") if ".norm." in name else name: value
        for name, value in state.items()
    }


def _instantx_union() -> dict[str, Tensor]:
    state = _random_controlnet(
        depth_single_blocks=1, latent_input=True, num_union_modes=4, control_latent_channels=16
    )
    names = comfy.utils.flux_to_diffusers(
        {"depth": 2, "depth_single_blocks": 1, "hidden_size": 128}
    )
    diffusers = {}
    for name, target in names.items():
        source, *rest = (target,) if isinstance(target, str) else target
        if source not in state or any(part in name for part in _FLUX2_NAMES):
            continue
        value = state[source]
        if rest and rest[0] is not None:
            value = value.narrow(*rest[0])
        diffusers[name] = value.clone()
    for name, value in state.items():
        if name.startswith(("controlnet_", "pos_embed_input")):
            diffusers[name.replace("pos_embed_input", "controlnet_x_embedder")] = value
            diffusers[name] = value.clone()
    return diffusers
