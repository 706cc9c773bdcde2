"""What the reference computes, against arithmetic written independently in torch."""

from __future__ import annotations

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
from flux_fp4.trt_runtime.errors.blocks import BlockContractError
from flux_fp4.trt_runtime.manifest import load_manifest
from flux_fp4.trt_runtime.reference import ReferenceExecutor
from flux_fp4.trt_runtime.reference_graph import DOMAIN, quantization_functions, reference_model
from flux_fp4.trt_runtime.reference_session import BlockSession
from flux_fp4.trt_runtime.reference_weights import BlockMatrices
from flux_fp4.trt_runtime.signature import read_signature
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
OPSETS = {"": 23, "trt": 1, DOMAIN: 1}


def quantizer() -> onnxruntime.InferenceSession:
    """A session with only the quantizer."""
    return session_of("TRT_FP4DynamicQuantize", "trt", ["x", "g"], ["q", "s"])


def session_of(
    function: str, domain: str, inputs: list[str], outputs: list[str], **attributes: float
) -> onnxruntime.InferenceSession:
    """A session of one call, as optimized as a block is."""
    node = helper.make_node(function, inputs, outputs, domain=domain, **attributes)
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        for names in (inputs, outputs)
    ]
    opsets = [helper.make_opsetid(name, version) for name, version in OPSETS.items()]
    model = helper.make_model(
        helper.make_graph([node], "g", *values), opset_imports=opsets, ir_version=11
    )
    model.functions.extend(quantization_functions(23))
    return onnxruntime.InferenceSession(model.SerializeToString())


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest E2M1 value; a tie goes to the even code. x: any shape, |x| <= 6."""
    # fp64, which tells the addend below
    distance = (x.abs().double()[..., None] - E2M1).abs()
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


def hard_values(codes: torch.Tensor) -> np.ndarray:
    """Every code, every tie between two, both fp32 neighbours of each, and the odd ones; signed."""
    ties = (codes[1:] + codes[:-1]) / 2
    exact = torch.cat((codes, ties)).numpy()
    beside = [np.nextafter(exact, np.float32(side)) for side in (0, np.inf)]
    largest = codes[-1].item()
    odd = np.array(
        [0, 1e-45, 1e-38, 1e-30, 3e38, np.inf, 1.01 * largest, 1e3 * largest], np.float32
    )
    random = np.random.default_rng(7)
    spread = np.exp(random.uniform(-20, np.log(2 * largest), 100_000)).astype(np.float32)
    values = np.concatenate((exact, *beside, odd, spread))
    return np.concatenate((values, -values))


def test_rounding_to_e4m3_equals_the_cast() -> None:
    x = hard_values(E4M3)
    session = session_of("QuantizeToE4M3", DOMAIN, ["x", "g"], ["q"])
    (q,) = session.run(None, {"x": x, "g": np.array(1, np.float32)})
    expected = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    np.testing.assert_array_equal(q, expected.numpy())
    zeros = expected == 0
    assert 10 < zeros.sum() < len(x) / 2


def test_nan_stays_nan() -> None:
    x = np.array([np.nan, 1], np.float32)
    session = session_of("QuantizeToE4M3", DOMAIN, ["x", "g"], ["q"])
    np.testing.assert_array_equal(session.run(None, {"x": x, "g": np.array(1, np.float32)})[0], x)


def test_rounding_to_e2m1_equals_the_nearest_code() -> None:
    values = hard_values(E2M1)
    # each value has a block of its own, whose largest value 6 makes the scale 1
    x = np.zeros((len(values), 16), np.float32)
    x[:, 0], x[:, 1] = np.clip(values, -6, 6), 6
    q, s = quantizer().run(None, {"x": x, "g": np.array(1, np.float32)})
    assert (s == 1).all()
    np.testing.assert_array_equal(q[:, 0], round_to_e2m1(torch.from_numpy(x[:, 0])).numpy())


def test_an_infinite_value_saturates_its_block() -> None:
    x = np.ones((2, 16), np.float32)
    x[0, 3] = -np.inf
    q, s = quantizer().run(None, {"x": x, "g": np.array(1e-3, np.float32)})
    assert s[0, 0] == 448
    assert q[0, 3] == -6
    assert np.isfinite(q).all()


@pytest.mark.parametrize("shape", [(3, 32), (2, 3, 32)])
def test_blocks_are_dequantized_by_their_own_scale(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    q = random.standard_normal(shape, np.float32)
    scale = random.standard_normal((*shape[:-1], 2), np.float32)
    session = session_of("DequantizeBlocks", DOMAIN, ["q", "scale"], ["y"])
    (y,) = session.run(None, {"q": q, "scale": scale})
    np.testing.assert_array_equal(y, q * scale.repeat(16, axis=-1))


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
    (y,) = BlockSession(tmp_path / "linear.onnx").run(None, {"x": x.numpy()})
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
    (y,) = BlockSession(tmp_path / "linear.onnx").run(None, {"x": x.numpy()})
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
    (before,) = BlockSession(tmp_path / "linear.onnx").run(None, {"x": x})
    weights = tmp_path / "tiny.safetensors"
    offset, _ = byte_ranges(weights)["single_blocks.0.linear.weight"]
    data = bytearray(weights.read_bytes())
    data[offset] ^= 0x07
    weights.write_bytes(data)
    (after,) = BlockSession(tmp_path / "linear.onnx").run(None, {"x": x})
    assert (before != after).nonzero()[-1].tolist() == [0]
    assert before[0, 0, 0] != after[0, 0, 0]


def test_matrices_are_fed_as_they_are_stored(built_folder: Path) -> None:
    path = built_folder / "single_blocks.0.onnx"
    model, matrices = reference_model(path)
    assert not any(len(t.dims) == 2 for t in model.graph.initializer)
    assert {t.data_type for t in model.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}
    shapes = sorted(matrix.shape for matrix in matrices.values())
    assert shapes == [(128, 5 * 128), (7 * 128, 128)]
    assert all(matrix.values.dtype == torch.uint8 for matrix in matrices.values())
    assert {value.name for value in model.graph.input} == {
        *matrices,
        *(spec.name for spec in read_signature(path).inputs),
    }


@pytest.mark.parametrize("attribute", ["block_size", "axis"])
def test_fp4_that_is_dequantized_otherwise_is_refused(tmp_path: Path, attribute: str) -> None:
    write_linear(tmp_path)
    path = tmp_path / "linear.onnx"
    model = onnx.load(path, load_external_data=False)
    (node,) = [n for n in model.graph.node if n.name == "linear/DQ_weight"]
    for entry in node.attribute:
        if entry.name == attribute:
            entry.i = 0
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BlockContractError, match=r"linear(\.|/DQ_)weight"):
        reference_model(path)


@pytest.mark.parametrize("block", ["double_blocks.0", "single_blocks.0"])
def test_block_equals_onnx_reference(built_folder: Path, block: str) -> None:
    entry = next(e for e in load_manifest(built_folder / "sm120").blocks if e.block == block)
    inputs = block_inputs(entry, img_tokens=6, txt_tokens=3)
    executor = ReferenceExecutor(built_folder)
    executor.load(torch.device("cpu"))
    ours = executor.run(block, inputs)
    model, matrices = reference_model(built_folder / f"{block}.onnx")
    feed = {name: x.float().numpy() for name, x in inputs.items()}
    theirs = ReferenceEvaluator(model).run(None, feed | BlockMatrices(matrices, None).arrays())
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
        path = folder / "single_blocks.0.onnx"
        random = np.random.default_rng(0)
        feed = {
            i.name: random.standard_normal(
                [{"B": 1, "S": 20}.get(d, d) for d in i.shape], dtype=np.float32
            )
            for i in read_signature(path).inputs
        }
        results.append(BlockSession(path).run(None, feed)[0])
    error = np.abs(results[0] - results[1]).max()
    assert 0 < error < 0.3 * np.abs(results[1]).max()
