"""Engines executed by TensorRT-RTX on the GPU of this machine, against the CPU reference.

    make gpu

Not a part of `make test`: without an NVIDIA GPU every test here fails. What ran where is in
docs/verified.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.recipe import QuantizeOptions, named_recipe
from flux_fp4.quant.sqnr import sqnr_db
from flux_fp4.tests.unit.trt_runtime.block_inputs import block_inputs
from flux_fp4.trt_runtime.adapters import LowRank, factor_shapes
from flux_fp4.trt_runtime.backend import probe_gpu
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.selection import Selection
from flux_fp4.trt_runtime.self_test import LIMIT_DB
from flux_fp4.trt_runtime.signature import read_signature
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile
from flux_fp4.trt_runtime.variant_plans import build_selected
from quantize_tiny import quantize
from tiny_flux import ignore_progress, random_flux, save_flux
from torch import Tensor

IMG_TOKENS, TXT_TOKENS = 256, 64
LEFT_BEHIND_BYTES = 64 << 20
"""What the driver and the libraries keep for themselves after the first load."""

PROFILE = ShapeProfile(
    max_batch=2,
    min_img_tokens=32,
    opt_img_tokens=256,
    max_img_tokens=1024,
    min_txt_tokens=16,
    opt_txt_tokens=64,
    max_txt_tokens=128,
)
Outputs = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def device() -> torch.device:
    gpu = probe_gpu()
    if gpu.problem:
        pytest.fail(f"These tests need an NVIDIA GPU: {gpu.problem}")
    return torch.device("cuda", torch.cuda.current_device())


def options_for(sm: str) -> QuantizeOptions:
    """Return the smallest format that a GPU generation multiplies in."""
    if sm in ("sm120", "sm121"):
        return QuantizeOptions(recipe=named_recipe("nvfp4-max"))
    if int(sm.removeprefix("sm")) >= 89:
        return QuantizeOptions(recipe=named_recipe("fp8"))
    return QuantizeOptions(recipe=named_recipe("bf16"), fp8_attention=False)


@pytest.fixture(scope="module")
def engine_dir(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small engine for this GPU; TensorRT-RTX may refuse the card, which is a result as well."""
    sm = probe_gpu(device).sm
    folder = tmp_path_factory.mktemp("model")
    source = save_flux(random_flux(), folder / "source.safetensors")
    checkpoint = quantize(source, folder / "tiny" / "tiny.safetensors", options_for(sm))
    export_blocks(checkpoint.path, ignore_progress)
    spec = BuildSpec(targets=(sm,), profile=PROFILE)
    build_engine(checkpoint.path.parent, spec, ignore_progress)
    return checkpoint.path.parent / spec.folder_name


@pytest.fixture
def engine(engine_dir: Path, device: torch.device) -> Engine:
    engine = Engine.open(engine_dir, "tensorrt_rtx", device)
    engine.load(device)
    yield engine
    engine.unload()


def run_all(engine: Engine, device: torch.device, **more: Tensor) -> Outputs:
    """Run every block on fixed inputs."""
    outputs = {}
    for entry in engine.manifest.blocks:
        inputs = block_inputs(entry, IMG_TOKENS, TXT_TOKENS) | more
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        outputs[entry.block] = {
            name: value.clone() for name, value in engine.run(entry.block, inputs).items()
        }
    return outputs


def reference_of(engine_dir: Path, selection: Selection, **more: Tensor) -> Outputs:
    """The same in ONNX Runtime on the CPU."""
    cpu = torch.device("cpu")
    reference = Engine.open(engine_dir, "reference")
    reference.use(selection)
    reference.load(cpu)
    return run_all(reference, cpu, **more)


def assert_close(engine: Engine, actual: Outputs, expected: Outputs) -> None:
    """Compare what each block adds to its inputs, as the self-test does."""
    found = {}
    for entry in engine.manifest.blocks:
        inputs = block_inputs(entry, IMG_TOKENS, TXT_TOKENS)
        for name, value in actual[entry.block].items():
            before = inputs[name.removesuffix("_out")].float()
            wanted = expected[entry.block][name].float().cpu()
            found[entry.block, name] = sqnr_db(wanted - before, value.float().cpu() - before)
    print(found)  # noqa: T201  # numbers for docs/verified.md
    assert min(found.values()) >= LIMIT_DB, found


def assert_same(actual: Outputs, expected: Outputs) -> None:
    for block, outputs in expected.items():
        for name, value in outputs.items():
            assert torch.equal(actual[block][name], value), f"{block}: {name}"


def lora_on(engine: Engine) -> Selection:
    """A LoRA of rank 4 on every Linear of the first block."""
    block = engine.manifest.blocks[0].block
    signature = read_signature(engine.folder.parent / f"{block}.lora.onnx")
    generator = torch.Generator().manual_seed(2)
    adapters = {
        linear: LowRank(
            torch.randn(width, 4, generator=generator) * width**-0.5,
            torch.randn(4, outputs, generator=generator) * 0.5,
        )
        for linear, (width, outputs) in factor_shapes(signature.inputs).items()
    }
    return Selection({block: adapters})


def test_blocks_compute_what_the_reference_does(engine: Engine, device: torch.device) -> None:
    expected = reference_of(engine.folder, Selection())
    assert_close(engine, run_all(engine, device), expected)


def test_lora_acts_and_leaves_the_base(engine: Engine, device: torch.device) -> None:
    before, selection = run_all(engine, device), lora_on(engine)
    build_selected(engine.folder, selection, ignore_progress)
    engine.use(selection)
    assert_close(engine, run_all(engine, device), reference_of(engine.folder, selection))
    engine.use(Selection())
    assert_same(run_all(engine, device), before)


def test_mask_acts(engine: Engine, device: torch.device) -> None:
    tokens = IMG_TOKENS + TXT_TOKENS
    mask = 2 * torch.randn(1, 1, tokens, tokens, generator=torch.Generator().manual_seed(5))
    selection = Selection(masked=True)
    build_selected(engine.folder, selection, ignore_progress)
    engine.use(selection)
    expected = reference_of(engine.folder, selection, mask=mask)
    assert_close(engine, run_all(engine, device, mask=mask), expected)


def test_plans_that_take_turns_give_the_same(engine: Engine, device: torch.device) -> None:
    before = run_all(engine, device)
    engine.limit(0)
    assert_same(run_all(engine, device), before)
    engine.limit(None)
    assert_same(run_all(engine, device), before)


def test_cuda_graphs_give_the_same(engine: Engine, device: torch.device) -> None:
    graphs = Engine.open(engine.folder, "tensorrt_rtx", device, cuda_graphs=True)
    graphs.load(device)
    for _ in range(3):  # captured once, then replayed
        assert_same(run_all(graphs, device), run_all(engine, device))
    graphs.unload()


def test_a_run_never_waits_for_the_gpu(engine: Engine, device: torch.device) -> None:
    entry = engine.manifest.blocks[-1]
    inputs = {
        name: tensor.to(device)
        for name, tensor in block_inputs(entry, IMG_TOKENS, TXT_TOKENS).items()
    }
    for _ in range(2):  # the shapes repeat, so kernels are stored
        engine.run(entry.block, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.run(entry.block, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_unloading_frees_the_memory(engine_dir: Path, device: torch.device) -> None:
    engine = Engine.open(engine_dir, "tensorrt_rtx", device)
    engine.load(device)
    run_all(engine, device)
    engine.unload()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    for _ in range(5):
        engine.load(device)
        run_all(engine, device)
        engine.unload()
    torch.cuda.empty_cache()
    lost = free - torch.cuda.mem_get_info(device)[0]
    assert lost < LEFT_BEHIND_BYTES, f"{lost:,} bytes"


def test_compiled_kernels_are_kept(engine: Engine, device: torch.device) -> None:
    run_all(engine, device)
    engine.unload()
    (cache,) = engine.folder.glob("runtime-*.cache")
    assert cache.stat().st_size > 0
    engine.load(device)
    run_all(engine, device)
