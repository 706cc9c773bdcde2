"""The one ONNX file of the whole transformer against its blocks one by one, and against torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from flux_fp4.quant.errors.export import TransformerExportError
from flux_fp4.quant.flux.blocks import block_modulation
from flux_fp4.quant.flux.config import FluxConfig
from flux_fp4.quant.flux.layers import rope_cos_sin
from flux_fp4.quant.flux.model import Flux, image_ids, text_ids
from flux_fp4.quant.modulation import stored_modulation
from flux_fp4.quant.onnx_export import TRANSFORMER_NAME, export_blocks, export_transformer
from flux_fp4.quant.onnx_export.contract import DOUBLE_MODULATION, SINGLE_MODULATION
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.trt_runtime.plan import BuildJob, PlanFactory
from flux_fp4.trt_runtime.reference import ReferenceExecutor
from flux_fp4.trt_runtime.reference_session import BlockSession
from flux_fp4.trt_runtime.signature import read_block_folder
from mixed_checkpoint import FORMATS, linears_in_plans, save_mixed
from stored_checkpoint import save_stored
from tiny_flux import TINY_VARIANTS, ignore_progress, random_flux
from torch import Tensor
from unquantized_checkpoint import save_unquantized

MIN_TORCH_DB = 100.0
"""Without rounding the two differ in the order of fp32 sums; measured 123 to 127 dB."""

MIN_BLOCKS_DB = 60.0
"""The same blocks run alone; where no value crosses a rounding edge this measures 128 dB."""

ROWS, COLUMNS, TEXT = 3, 4, 5
Inputs = dict[str, Tensor]


def step_inputs(config: FluxConfig) -> Inputs:
    """Inputs of one step for two images, every one of the model's own."""
    generator = torch.Generator().manual_seed(3)
    patch = config.patch_size
    ids = torch.cat(
        (
            text_ids(TEXT, config, 2),
            image_ids(ROWS * patch, COLUMNS * patch, 2, patch, len(config.axes_dim)),
        ),
        dim=1,
    )
    cos, sin = rope_cos_sin(ids, config.axes_dim, config.theta)
    tokens = ROWS * COLUMNS
    inputs = {
        "img": torch.randn(2, tokens, config.in_channels * patch**2, generator=generator),
        "txt": torch.randn(2, TEXT, config.context_in_dim, generator=generator),
        "timesteps": torch.tensor([0.25, 0.9]),
        "cos": cos,
        "sin": sin,
    }
    if config.guidance_embed:
        inputs["guidance"] = torch.tensor([3.5, 1.0])
    if config.vec_in_dim:
        inputs["y"] = torch.randn(2, config.vec_in_dim, generator=generator)
    return inputs


def velocity_of(path: Path, inputs: Inputs) -> Tensor:
    feed = {name: value.numpy() for name, value in inputs.items()}
    (velocity,) = BlockSession(path).run(["velocity"], feed)
    return torch.from_numpy(velocity)


def velocity_block_by_block(model: Flux, folder: Path, inputs: Inputs) -> Tensor:
    """Torch around the blocks, each block's own ONNX file run by the reference executor."""
    executor = ReferenceExecutor(folder)
    executor.load(torch.device("cpu"))
    rotary = {name: inputs[name] for name in ("cos", "sin")}
    img, txt, vec = model.embed(
        inputs["img"], inputs["txt"], inputs["timesteps"], inputs.get("y"), inputs.get("guidance")
    )
    shared = model.shared_modulation(vec)
    for index, block in enumerate(model.double_blocks):
        mods = zip(DOUBLE_MODULATION, block_modulation(block, vec, shared), strict=True)
        out = executor.run(
            f"double_blocks.{index}", {"img": img, "txt": txt, **rotary, **dict(mods)}
        )
        img, txt = out["img_out"], out["txt_out"]
    x = torch.cat((txt, img), dim=1)
    for index, block in enumerate(model.single_blocks):
        mods = zip(SINGLE_MODULATION, block_modulation(block, vec, shared), strict=True)
        x = executor.run(f"single_blocks.{index}", {"x": x, **rotary, **dict(mods)})["x_out"]
    return model.final_layer(x[:, TEXT:], vec)


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_unquantized_equals_torch(tmp_path: Path, variant: str) -> None:
    config = TINY_VARIANTS[variant]
    model = random_flux(config)
    save_unquantized(model, tmp_path / "plain.safetensors")
    path = export_transformer(tmp_path / "plain.safetensors", ignore_progress)
    inputs = step_inputs(config)
    patch = config.patch_size
    expected = model(
        inputs["img"],
        image_ids(ROWS * patch, COLUMNS * patch, 2, patch, len(config.axes_dim)),
        inputs["txt"],
        text_ids(TEXT, config, 2),
        inputs["timesteps"],
        inputs.get("y"),
        inputs.get("guidance"),
    )
    db = sqnr_db(expected, velocity_of(path, inputs))
    assert db >= MIN_TORCH_DB, f"{variant}: {db:.1f} dB, at least {MIN_TORCH_DB} expected"


def mixed(model: Flux, path: Path) -> QuantizedCheckpoint:
    names = linears_in_plans(model)
    formats = {name: FORMATS[index % len(FORMATS)] for index, name in enumerate(names)}
    return save_mixed(model, path, formats)


@pytest.mark.parametrize("variant", ["flux1-dev", "flux2-dev"])
def test_quantized_equals_its_blocks(tmp_path: Path, variant: str) -> None:
    model = random_flux(TINY_VARIANTS[variant])
    for parameter in model.parameters():  # what the checkpoint keeps is bf16
        parameter.copy_(parameter.bfloat16())
    checkpoint = mixed(model, tmp_path / "mixed.safetensors")
    export_blocks(checkpoint.path, ignore_progress)
    path = export_transformer(checkpoint.path, ignore_progress)
    inputs = step_inputs(model.config)
    expected = velocity_block_by_block(model, tmp_path, inputs)
    db = sqnr_db(expected, velocity_of(path, inputs))
    assert db >= MIN_BLOCKS_DB, f"{variant}: {db:.1f} dB, at least {MIN_BLOCKS_DB} expected"


def test_no_weight_is_copied(tmp_path: Path) -> None:
    checkpoint = mixed(random_flux(), tmp_path / "mixed.safetensors")
    path = export_transformer(checkpoint.path, ignore_progress)
    assert path.name == TRANSFORMER_NAME
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    pointed_at = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            pointed_at[tensor.name] = (int(place["offset"]), int(place["length"]))
        else:
            assert np.prod(tensor.dims, dtype=int) <= checkpoint.metadata.config.hidden_size
    assert pointed_at == {
        name: (stored.offset, stored.length) for name, stored in checkpoint.tensors.items()
    }


def test_engines_ignore_the_file(tmp_path: Path) -> None:
    checkpoint = mixed(random_flux(), tmp_path / "mixed.safetensors")
    export_blocks(checkpoint.path, ignore_progress)
    before = read_block_folder(tmp_path)
    export_transformer(checkpoint.path, ignore_progress)
    assert read_block_folder(tmp_path) == before


def test_tensorrt_builds_it_with_every_gemm_in_its_format(tmp_path: Path) -> None:
    model = random_flux()
    names = linears_in_plans(model)
    formats = {name: FORMATS[index % len(FORMATS)] for index, name in enumerate(names)}
    checkpoint = save_mixed(model, tmp_path / "mixed.safetensors", formats, fp8_attention=False)
    path = export_transformer(checkpoint.path, ignore_progress)
    axes = {"B": (1, 1, 2), "N": (32, 64, 256), "T": (1, 16, 32), "S": (33, 80, 288)}
    profile = {}
    for value in onnx.load(path, load_external_data=False).graph.input:
        dims = value.type.tensor_type.shape.dim
        bounds = [axes.get(dim.dim_param, (dim.dim_value,) * 3) for dim in dims]
        profile[value.name] = tuple(zip(*bounds, strict=True))
    in_format: dict[str, list[str]] = {"nvfp4": [], "fp8": [], "bf16": []}
    for name, kind in formats.items():
        stack, index, linear = name.split(".", 2)
        in_format[kind.split("-")[0]].append(f"{stack}.{index}/{linear}")
    job = BuildJob(
        block=path.stem,
        backend="tensorrt_rtx",
        onnx=str(path),
        plan=str(tmp_path / "transformer.plan"),
        targets=("sm120",),
        profile=profile,
        fp4_linears=tuple(in_format["nvfp4"]),
        fp8_linears=tuple(in_format["fp8"]),
        fp8_attention=False,
    )
    built = PlanFactory("tensorrt_rtx", lambda line: None).build(job)
    assert built.fp4_gemms_found == len(in_format["nvfp4"])
    assert built.fp8_gemms_found == len(in_format["fp8"])


def with_stored_modulation(model: Flux, path: Path, storage: str) -> QuantizedCheckpoint:
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    for name in [
        name for name in state if name.endswith(("mod.lin.weight", "modulation.lin.weight"))
    ]:
        state |= stored_modulation(name, state.pop(name), storage)
    return save_stored(state, path, model.config)


def test_modulation_in_fp8_is_read_in_place(tmp_path: Path) -> None:
    model = random_flux()
    checkpoint = with_stored_modulation(model, tmp_path / "fp8.safetensors", "fp8")
    path = export_transformer(checkpoint.path, ignore_progress)
    stored = checkpoint.high_precision_state_dict()
    rounded = {name: t.bfloat16().float() for name, t in model.state_dict().items()}
    for name in rounded:
        scale = stored.get(f"{name.removesuffix('.weight')}.weight_scale")
        if scale is not None:
            rounded[name] = stored[name].float() * scale
    model.load_state_dict(rounded)
    inputs = step_inputs(model.config)
    patch = model.config.patch_size
    expected = model(
        inputs["img"],
        image_ids(ROWS * patch, COLUMNS * patch, 2, patch),
        inputs["txt"],
        text_ids(TEXT, model.config, 2),
        inputs["timesteps"],
        inputs["y"],
        inputs["guidance"],
    )
    db = sqnr_db(expected, velocity_of(path, inputs))
    assert db >= MIN_TORCH_DB, f"{db:.1f} dB, at least {MIN_TORCH_DB} expected"


def test_modulation_in_comfyuis_nvfp4_is_refused(tmp_path: Path) -> None:
    checkpoint = with_stored_modulation(random_flux(), tmp_path / "fp4.safetensors", "nvfp4")
    with pytest.raises(TransformerExportError, match=r"img_mod\.lin"):
        export_transformer(checkpoint.path, ignore_progress)
    assert not (tmp_path / TRANSFORMER_NAME).exists()


def test_cancel_leaves_no_file(tmp_path: Path) -> None:
    checkpoint = save_unquantized(random_flux(), tmp_path / "plain.safetensors")

    def cancel(phase: str, done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_transformer(checkpoint.path, cancel)
    assert [entry.name for entry in tmp_path.glob("*.onnx")] == []
