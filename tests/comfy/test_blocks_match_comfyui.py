"""Our blocks, in torch and as exported ONNX, against ComfyUI's own: fp32, unquantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from block_inputs import block_inputs, embedded_sample
from comfy_in_process import import_comfyui
from flux_fp4.quant.block_quantizer import run_block
from flux_fp4.quant.flux.model import image_ids, patchify, unpatchify
from flux_fp4.quant.onnx_export import export_blocks, onnx_path
from flux_fp4.trt_runtime.reference import session_from_onnx
from tiny_flux import TINY, ignore_progress, random_flux
from unquantized_checkpoint import save_unquantized

MAX_DIFFERENCE = 1e-5


@pytest.fixture(scope="module")
def comfy_flux() -> torch.nn.Module:
    """ComfyUI's Flux with the tiny model's weights."""
    import_comfyui()
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    config = TINY.unet_config()
    model = Flux(
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init, **config
    )
    state = {
        name.replace("_norm.scale", "_norm.weight"): value
        for name, value in random_flux().state_dict().items()
    }
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's blocks as fp32 ONNX files."""
    path = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    save_unquantized(random_flux(), path)
    export_blocks(path, ignore_progress)
    return path


def comfy_block(model: torch.nn.Module, name: str, tokens: dict[str, torch.Tensor]) -> list:
    state = embedded_sample()
    pe = torch.stack((state.cos, -state.sin, state.sin, state.cos), dim=-1)
    pe = pe.unflatten(-1, (2, 2)).unsqueeze(1)
    # ComfyUI's blocks add to their inputs in place
    copies = {key: value.clone() for key, value in tokens.items()}
    result = model.get_submodule(name)(**copies, vec=state.vec, pe=pe)
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", TINY.block_names)
@pytest.mark.parametrize("ours", ["torch", "onnx"])
def test_block(comfy_flux: torch.nn.Module, exported: Path, name: str, ours: str) -> None:
    state = embedded_sample()
    module = random_flux().get_submodule(name)
    inputs = block_inputs(module, state)  # type: ignore[arg-type]
    tokens = {key: inputs[key] for key in ("img", "txt", "x") if key in inputs}
    expected = comfy_block(comfy_flux, name, tokens)
    if ours == "torch":
        output = run_block(module, state)  # type: ignore[arg-type]
        actual = [output.img] if output.txt is None else [output.img, output.txt]
    else:
        feed = {key: value.numpy() for key, value in inputs.items()}
        session = session_from_onnx(onnx_path(exported, name))
        actual = [torch.from_numpy(result) for result in session.run(None, feed)]
    for left, right in zip(expected, actual, strict=True):
        difference = (left - right).abs().max().item()
        assert difference <= MAX_DIFFERENCE, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("size", [(8, 8), (9, 14)], ids=["even", "odd_and_wide"])
def test_whole_model(comfy_flux: torch.nn.Module, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 16, *size, generator=generator)
    context = torch.randn(2, 7, TINY.context_in_dim, generator=generator)
    y = torch.randn(2, TINY.vec_in_dim, generator=generator)
    t, guidance = torch.tensor([0.3, 0.9]), torch.tensor([3.5, 1.0])
    expected = comfy_flux(x, t, context, y, guidance)
    patches = random_flux()(
        patchify(x), image_ids(*size, 2), context, torch.zeros(2, 7, 3), t, y, guidance
    )
    difference = (expected - unpatchify(patches, *size)).abs().max().item()
    assert difference <= MAX_DIFFERENCE, f"{difference:.2e}"
