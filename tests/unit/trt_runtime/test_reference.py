"""The reference backend against arithmetic written independently in torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from flux_fp4.tests.unit.trt_runtime.block_graph import (
    BlockGraph,
    byte_ranges,
    stored_model,
    write_blocks,
)
from flux_fp4.tests.unit.trt_runtime.block_inputs import block_inputs
from flux_fp4.trt_runtime.errors.blocks import BlocksMissingError
from flux_fp4.trt_runtime.errors.run import EngineNotLoadedError
from flux_fp4.trt_runtime.manifest import load_manifest
from flux_fp4.trt_runtime.reference import ReferenceExecutor, session_from_onnx
from flux_fp4.trt_runtime.reference_graph import (
    dynamic_quantize_function,
    fp8_from_packed_fp4,
    reference_model,
)
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def quantizer() -> onnxruntime.InferenceSession:
    """A session with only the quantizer; its FP8 results are cast to fp32, which is exact."""
    nodes = [
        helper.make_node("TRT_FP4DynamicQuantize", ["x", "g"], ["q8", "s8"], domain="trt"),
        helper.make_node("Cast", ["q8"], ["q"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["s8"], ["s"], to=TensorProto.FLOAT),
    ]
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xgqs"}
    graph = helper.make_graph(nodes, "g", [values["x"], values["g"]], [values["q"], values["s"]])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    model.functions.append(dynamic_quantize_function(23))
    return onnxruntime.InferenceSession(model.SerializeToString())


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest E2M1 value; a tie goes to the even code. x: any shape, |x| <= 6."""
    distance = (x.abs()[..., None] - E2M1).abs()
    # of two equally near codes the even one wins
    order = distance + 1e-9 * (torch.arange(8) % 2)
    return torch.copysign(E2M1[order.argmin(-1)], x)


def quantized(x: torch.Tensor, gscale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4 of [..., K]: E2M1 values [..., K] and E4M3 scales [..., K/16] as fp32."""
    g = torch.tensor(gscale)
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    scale = (blocks.abs().amax(-1) / (6 * g)).clamp(max=448).to(torch.float8_e4m3fn).float()
    step = scale * g
    scaled = torch.where(step[..., None] > 0, blocks / step[..., None], 6 * blocks.sign())
    return round_to_e2m1(scaled.clamp(-6, 6)).reshape(x.shape), scale


SIGNALS: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "normal": lambda r: torch.randn(7, 64, generator=r),
    "heavy tails": lambda r: torch.randn(7, 64, generator=r) ** 7,
    "zero blocks": lambda r: torch.randn(7, 64, generator=r) * (torch.arange(64) < 16),
    "all zero": lambda r: torch.zeros(2, 32),
    "saturating": lambda r: torch.randn(7, 64, generator=r) * 1e6,
    "underflowing": lambda r: torch.randn(7, 64, generator=r) * 1e-9,
    "wide range": lambda r: (
        torch.randn(7, 64, generator=r) * torch.logspace(-6, 3, 64)[torch.randperm(64, generator=r)]
    ),
    "rank 3": lambda r: torch.randn(2, 3, 32, generator=r),
}


@pytest.mark.parametrize("signal", SIGNALS.values(), ids=list(SIGNALS))
def test_quantizer_is_exact(signal: Callable[[torch.Generator], torch.Tensor]) -> None:
    x = signal(torch.Generator().manual_seed(3))
    gscale = 4 / 2688
    q, s = quantizer().run(None, {"x": x.numpy(), "g": np.array(gscale, np.float32)})
    values, scale = quantized(x, gscale)
    np.testing.assert_array_equal(s, scale.numpy())
    np.testing.assert_array_equal(q, values.numpy())


def test_all_codes_and_all_ties_of_the_quantizer() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    evens = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    # amax 6 with a global scale of 1 gives block scale 1: values are rounded as they are
    x = torch.stack([torch.cat([E2M1, -E2M1]), torch.cat([ties, -ties, torch.tensor([6.0, 0.0])])])
    q, s = quantizer().run(None, {"x": x.numpy(), "g": np.array(1, np.float32)})
    np.testing.assert_array_equal(s, np.ones((2, 1), np.float32))
    np.testing.assert_array_equal(q[0], x[0].numpy())
    np.testing.assert_array_equal(q[1, :14], torch.cat([evens, -evens]).numpy())


def test_block_scale_divides_by_the_product_of_six_and_the_global_scale() -> None:
    # amax / (6 g) and (amax / 6) / g differ in the last bit; near a tie of E4M3 it decides the
    # scale
    codes = torch.arange(8, 126, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = ((codes[1:] + codes[:-1]) / 2).numpy()
    g = np.float32(0.0013)
    amax = np.concatenate([np.nextafter(ties * 6 * g, np.float32(side)) for side in (0, 9e9)])
    ours = torch.from_numpy(amax / (np.float32(6) * g)).to(torch.float8_e4m3fn).float().numpy()
    other = torch.from_numpy(amax / np.float32(6) / g).to(torch.float8_e4m3fn).float().numpy()
    assert (ours != other).any()
    x = np.zeros((len(amax), 16), np.float32)
    x[:, 0] = amax
    _, s = quantizer().run(None, {"x": x, "g": np.array(g)})
    np.testing.assert_array_equal(s[:, 0], ours)


def test_packed_fp4_becomes_fp8_low_nibble_first() -> None:
    every_pair = bytes(range(256))
    values = torch.frombuffer(bytearray(fp8_from_packed_fp4(every_pair)), dtype=torch.uint8)
    table = torch.cat([E2M1, -E2M1])
    codes = torch.arange(256)
    expected = torch.stack([table[codes % 16], table[codes // 16]], dim=1).flatten()
    assert torch.equal(values.view(torch.float8_e4m3fn).float(), expected)


def write_linear(folder: Path, high_precision: str = "bf16", **options: object) -> BlockGraph:
    """Write an ONNX file with one FP4 Linear [K=96, N=80] over a safetensors file."""
    graph = BlockGraph("single_blocks.0", 0, 1, high_precision=high_precision, **options)
    graph.nodes.append(
        helper.make_node("Identity", [graph.linear("x", "linear", 96, 80)], ["y"], name="out")
    )
    weights = folder / "tiny.safetensors"
    save_file(graph.tensors, weights)
    values = [helper.make_tensor_value_info(n, graph.onnx_dtype, ["B", "S", k])
              for n, k in (("x", 96), ("y", 80))]  # fmt: skip
    model = stored_model(graph, values[:1], values[1:], weights)
    (folder / "linear.onnx").write_bytes(model.SerializeToString())
    return graph


def weight_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Dequantize the stored weight [N, K]."""
    packed = tensors["weight"]
    table = torch.cat([E2M1, -E2M1])
    values = torch.stack([table[(packed & 15).long()], table[(packed >> 4).long()]], -1).flatten(1)
    scale = tensors["weight_scale"].float() * tensors["weight_scale_2"]
    return values * scale.repeat_interleave(16, dim=1)


@pytest.mark.parametrize("high_precision", ["bf16", "fp16", "fp32"])
def test_linear_equals_torch_on_the_same_packed_weights(
    tmp_path: Path, high_precision: str
) -> None:
    graph = write_linear(tmp_path, high_precision)
    tensors = {
        name.removeprefix("single_blocks.0.linear."): tensor
        for name, tensor in graph.tensors.items()
    }
    x = torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(5))
    (y,) = session_from_onnx(tmp_path / "linear.onnx").run(None, {"x": x.numpy()})
    gscale = float(tensors["input_scale"])
    values, scale = quantized(x, gscale)
    rounded = values * (scale * gscale).repeat_interleave(16, dim=-1)
    expected = rounded @ weight_of(tensors).T + tensors["bias"].float()
    noise = torch.from_numpy(y) - expected
    sqnr_db = 10 * torch.log10(expected.square().mean() / noise.square().mean()).item()
    assert sqnr_db >= 100, f"{sqnr_db:.1f} dB"


@pytest.mark.parametrize("high_precision", ["bf16", "fp32"])
def test_fp8_linear_equals_torch_on_the_same_weights(tmp_path: Path, high_precision: str) -> None:
    graph = write_linear(tmp_path, high_precision, fp8=("linear",))
    tensors = {
        name.removeprefix("single_blocks.0.linear."): tensor
        for name, tensor in graph.tensors.items()
    }
    x = 2 * torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(5))
    (y,) = session_from_onnx(tmp_path / "linear.onnx").run(None, {"x": x.numpy()})
    step = tensors["input_scale"]
    # the definition of saturation, not a clamp: 448 is E4M3's largest value
    values = torch.where(x.abs() > 448 * step, 448 * x.sign(), x / step).to(torch.float8_e4m3fn)
    assert (values.float().abs() == 448).any()
    weight = tensors["weight"].float() * tensors["weight_scale"][:, None]
    expected = (values.float() * step) @ weight.T + tensors["bias"].float()
    noise = torch.from_numpy(y) - expected
    sqnr_db = 10 * torch.log10(expected.square().mean() / noise.square().mean()).item()
    assert sqnr_db >= 100, f"{sqnr_db:.1f} dB"


def test_changing_one_weight_byte_changes_the_result(tmp_path: Path) -> None:
    write_linear(tmp_path)
    x = np.ones((1, 1, 96), np.float32)
    (before,) = session_from_onnx(tmp_path / "linear.onnx").run(None, {"x": x})
    weights = tmp_path / "tiny.safetensors"
    offset, _ = byte_ranges(weights)["single_blocks.0.linear.weight"]
    data = bytearray(weights.read_bytes())
    data[offset] ^= 0x07
    weights.write_bytes(data)
    (after,) = session_from_onnx(tmp_path / "linear.onnx").run(None, {"x": x})
    assert (before != after).nonzero()[-1].tolist() == [0]
    assert before[0, 0, 0] != after[0, 0, 0]


def test_weights_stay_quantized_in_the_rewritten_model(built_folder: Path) -> None:
    model = reference_model(built_folder / "single_blocks.0.onnx")
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert kinds["linear1.weight"] == TensorProto.FLOAT8E4M3FN
    assert not set(kinds.values()) & {
        TensorProto.BFLOAT16,
        TensorProto.FLOAT16,
        TensorProto.FLOAT4E2M1,
    }
    (weight,) = [t for t in model.graph.initializer if t.name == "linear1.weight"]
    assert len(weight.raw_data) == weight.dims[0] * weight.dims[1]


@pytest.mark.parametrize("block", ["double_blocks.0", "single_blocks.0"])
def test_block_equals_onnx_reference(built_folder: Path, block: str) -> None:
    entry = next(e for e in load_manifest(built_folder / "sm120").blocks if e.block == block)
    inputs = block_inputs(entry, img_tokens=6, txt_tokens=3)
    executor = ReferenceExecutor(built_folder)
    executor.load(torch.device("cpu"))
    ours = executor.run(block, inputs)
    evaluator = ReferenceEvaluator(reference_model(built_folder / f"{block}.onnx"))
    theirs = evaluator.run(None, {name: x.float().numpy() for name, x in inputs.items()})
    for spec, expected in zip(entry.outputs, theirs, strict=True):
        difference = ours[spec.name].numpy() - expected
        signal = expected - inputs[spec.name.removesuffix("_out")].float().numpy()
        noise = np.square(difference).mean() + np.finfo(np.float32).tiny
        sqnr_db = 10 * np.log10(np.square(signal).mean() / noise)
        # a rounding flip of one FP4 value moves its token; both evaluators sum in another order
        assert sqnr_db >= 30, f"{spec.name}: {sqnr_db:.1f} dB"


def test_fp8_attention_is_executed(tmp_path: Path) -> None:
    """The same block with and without FP8 attention differs by rounding only, and does differ."""
    results = []
    for fp8 in (True, False):
        folder = write_blocks(tmp_path / str(fp8), depth=0, fp8_attention=fp8)
        session = session_from_onnx(folder / "single_blocks.0.onnx")
        random = np.random.default_rng(0)
        feed = {
            i.name: random.standard_normal(
                [{"B": 1, "S": 20}.get(d, d) for d in i.shape], dtype=np.float32
            )
            for i in session.get_inputs()
        }
        results.append(session.run(None, feed)[0])
    error = np.abs(results[0] - results[1]).max()
    assert 0 < error < 0.3 * np.abs(results[1]).max()


def test_unload_frees_and_load_brings_back(built_folder: Path) -> None:
    executor = ReferenceExecutor(built_folder)
    assert not executor.loaded
    with pytest.raises(EngineNotLoadedError):
        executor.run("single_blocks.0", {})
    executor.load(torch.device("cpu"))
    assert executor.loaded
    executor.unload()
    assert not executor.loaded
    with pytest.raises(EngineNotLoadedError):
        executor.run("single_blocks.0", {})


def test_reference_needs_the_onnx_files(built_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BlocksMissingError):
        ReferenceExecutor(tmp_path)
    tensors = load_file(built_folder / "tiny.safetensors")
    stored = sum(tensor.nbytes for name, tensor in tensors.items() if name != "ones")
    assert ReferenceExecutor(built_folder).weight_bytes == 4 * stored


def test_onnx_files_hold_no_weights(built_folder: Path) -> None:
    for path in built_folder.glob("*.onnx"):
        assert path.stat().st_size < 300_000
        onnx.checker.check_model(path, full_check=True)
        properties = {p.key: p.value for p in onnx.load(path).metadata_props}
        assert json.loads(properties["flux_fp4.fp4_linears"])
