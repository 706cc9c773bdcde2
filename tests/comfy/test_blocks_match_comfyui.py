"""Our blocks, in torch and as exported ONNX, against ComfyUI's own: fp32, unquantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from block_inputs import block_inputs, embedded_sample
from comfy_in_process import import_comfyui
from flux_fp4.quant.calibration import SampleState
from flux_fp4.quant.flux.config import FluxConfig
from flux_fp4.quant.flux.model import patchify, text_ids, unpatchify
from flux_fp4.quant.flux.references import image_and_reference_ids
from flux_fp4.quant.onnx_export import export_blocks, onnx_path
from flux_fp4.quant.stack import run_block
from flux_fp4.trt_runtime.reference_session import BlockSession
from tiny_flux import TINY, TINY_FLUX2, ignore_progress, random_flux
from unquantized_checkpoint import save_unquantized

MAX_DIFFERENCE = 1e-5


CONFIGS = {"flux1": TINY, "flux2": TINY_FLUX2}


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> FluxConfig:
    """Both families: FLUX.1 and FLUX.2."""
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def comfy_flux(config: FluxConfig) -> torch.nn.Module:
    """ComfyUI's Flux with the tiny model's weights."""
    import_comfyui()
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    model = Flux(
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
        **config.unet_config(),
    )
    state = {
        name.replace("_norm.scale", "_norm.weight"): value
        for name, value in random_flux(config).state_dict().items()
    }
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def exported(config: FluxConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's blocks as fp32 ONNX files."""
    path = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    save_unquantized(random_flux(config), path)
    export_blocks(path, ignore_progress)
    return path


def comfy_block(model: Any, name: str, state: SampleState, tokens: dict[str, torch.Tensor]) -> list:
    pe = torch.stack((state.cos, -state.sin, state.sin, state.cos), dim=-1)
    pe = pe.unflatten(-1, (2, 2)).unsqueeze(1)
    # ComfyUI's blocks add to their inputs in place
    copies = {key: value.clone() for key, value in tokens.items()}
    vec = state.vec
    if model.params.global_modulation and "img" in tokens:
        vec = (model.double_stream_modulation_img(vec), model.double_stream_modulation_txt(vec))
    elif model.params.global_modulation:
        vec, _ = model.single_stream_modulation(vec)
    result = model.get_submodule(name)(**copies, vec=vec, pe=pe)
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", TINY.block_names)
@pytest.mark.parametrize("ours", ["torch", "onnx"])
def test_block(
    comfy_flux: torch.nn.Module, config: FluxConfig, exported: Path, name: str, ours: str
) -> None:
    state = embedded_sample(config=config)
    module = random_flux(config).get_submodule(name)
    inputs = block_inputs(module, state)  # type: ignore[arg-type]
    tokens = {key: inputs[key] for key in ("img", "txt", "x") if key in inputs}
    expected = comfy_block(comfy_flux, name, state, tokens)
    if ours == "torch":
        output = run_block(module, state)  # type: ignore[arg-type]
        actual = [output.img] if output.txt is None else [output.img, output.txt]
    else:
        feed = {key: value.numpy() for key, value in inputs.items()}
        session = BlockSession(onnx_path(exported, name))
        actual = [torch.from_numpy(result) for result in session.run(None, feed)]
    for left, right in zip(expected, actual, strict=True):
        difference = (left - right).abs().max().item()
        assert difference <= MAX_DIFFERENCE, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("size", [(8, 8), (9, 14)], ids=["even", "odd_and_wide"])
@pytest.mark.parametrize("reference", [False, True], ids=["alone", "with_reference"])
def test_whole_model(
    comfy_flux: torch.nn.Module, config: FluxConfig, size: tuple[int, int], reference: bool
) -> None:
    generator = torch.Generator().manual_seed(4)
    patch = config.patch_size
    x = torch.randn(2, config.in_channels, *size, generator=generator)
    other = [torch.randn(2, config.in_channels, 5, 6, generator=generator)] if reference else []
    context = torch.randn(2, 7, config.context_in_dim, generator=generator)
    pooled = torch.randn(2, config.vec_in_dim, generator=generator) if config.vec_in_dim else None
    t, guidance = torch.tensor([0.3, 0.9]), torch.tensor([3.5, 1.0])
    expected = comfy_flux(x, t, context, pooled, guidance, ref_latents=other or None)
    tokens = torch.cat([patchify(latent, patch) for latent in (x, *other)], dim=1)
    sizes = [tuple(latent.shape[-2:]) for latent in other]
    ids = image_and_reference_ids(size, sizes, config.default_ref_method, config)
    velocity = random_flux(config)(
        tokens, ids.expand(2, -1, -1), context, text_ids(7, config, 2), t, pooled, guidance
    )[:, : patchify(x, patch).shape[1]]
    difference = (expected - unpatchify(velocity, *size, patch)).abs().max().item()
    assert difference <= MAX_DIFFERENCE, f"{difference:.2e}"
