"""Small block ONNX files that follow the export contract, with weights inside one safetensors file.

The real exporter lives in quant/, which these tests must not need. Weights are random; the graph
has the same node names, inputs, metadata and FP4 and FP8 forms as an exported block.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

HIGH_PRECISION = {
    "bf16": (TensorProto.BFLOAT16, torch.bfloat16),
    "fp16": (TensorProto.FLOAT16, torch.float16),
    "fp32": (TensorProto.FLOAT, torch.float32),
}
E2M1_MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
DOUBLE_LINEARS = tuple(
    f"{stream}_{name}"
    for stream in ("img", "txt")
    for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
)
MODULATION = tuple(
    f"{part}_{name}" for part in ("mod1", "mod2") for name in ("shift", "scale", "gate")
)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return packed E2M1 [N, K/2], E4M3 block scales [N, K/16] and the global scale of [N, K]."""
    global_scale = weight.abs().amax() / (6 * 448)
    blocks = weight.reshape(weight.shape[0], -1, 16)
    scale = (blocks.abs().amax(-1) / (6 * global_scale)).to(torch.float8_e4m3fn)
    scaled = blocks / (scale.float() * global_scale)[..., None]
    codes = torch.bucketize(scaled.abs(), E2M1_MIDPOINTS) + 8 * (scaled < 0)
    codes = codes.reshape(weight.shape).to(torch.uint8)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scale, global_scale


@dataclass
class BlockGraph:
    """Collects nodes, and initializers that point into a safetensors file."""

    block: str
    hidden: int
    heads: int
    high_precision: str = "bf16"
    fp8_attention: bool = True
    weight_only: tuple[str, ...] = ()
    """Linears whose activation is not quantized: TensorRT silently builds those as bf16 GEMMs."""
    fp8: tuple[str, ...] = ()
    """Linears in FP8; the others are FP4."""
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    initializers: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    small: list[TensorProto] = field(default_factory=list)
    linears: dict[str, list[str]] = field(default_factory=lambda: {"fp4": [], "fp8": []})

    def __post_init__(self) -> None:
        self.onnx_dtype, self.torch_dtype = HIGH_PRECISION[self.high_precision]
        self.random = torch.Generator().manual_seed(self.seed)

    def op(self, kind: str, inputs: list[str], *, name: str = "", outputs: int = 1, **attributes):
        name = name or f"n{len(self.nodes)}_{kind}"
        names = [f"{name}:{i}" for i in range(outputs)]
        domain = "trt" if kind.startswith("TRT_") else ""
        self.nodes.append(
            helper.make_node(kind, inputs, names, name=name, domain=domain, **attributes)
        )
        return names[0] if outputs == 1 else names

    def stored(self, name: str, tensor: torch.Tensor, onnx_dtype: int, shape=None) -> str:
        self.tensors[f"{self.block}.{name}"] = tensor.contiguous()
        self.initializers[name] = (onnx_dtype, tuple(tensor.shape if shape is None else shape))
        return name

    def constant(self, values, onnx_dtype: int) -> str:
        name = f"c{len(self.small)}"
        array = np.asarray(values)
        self.small.append(helper.make_tensor(name, onnx_dtype, array.shape, array.ravel().tolist()))
        return name

    def integers(self, values: list[int]) -> str:
        return self.constant(values, TensorProto.INT64)

    def number(self, value: float) -> str:
        return self.constant(value, self.onnx_dtype)

    def cast(self, x: str) -> str:
        return x if self.high_precision == "fp32" else self.op("Cast", [x], to=self.onnx_dtype)

    def quantized_activation(self, x: str, linear: str) -> str:
        gscale = self.stored(f"{linear}.input_scale", torch.tensor(4.0 / 2688), TensorProto.FLOAT)
        values, scale = self.op(
            "TRT_FP4DynamicQuantize", [x, gscale], name=f"{linear}/Quantize", outputs=2,
            axis=-1, block_size=16, scale_type=TensorProto.FLOAT8E4M3FN,
        )  # fmt: skip
        scale = self.cast(self.op("DequantizeLinear", [scale, gscale]))
        return self.op("DequantizeLinear", [values, scale], axis=-1, block_size=16)

    def linear(self, x: str, name: str, k: int, n: int) -> str:
        weight = torch.randn(n, k, generator=self.random) * k**-0.5
        multiply = self.fp8_product if name in self.fp8 else self.fp4_product
        y = multiply(x, name, weight)
        bias = torch.randn(n, generator=self.random) * 0.01
        b = self.stored(f"{name}.bias", bias.to(self.torch_dtype), self.onnx_dtype)
        return self.op("Add", [y, b])

    def fp8_product(self, x: str, name: str, weight: torch.Tensor) -> str:
        self.linears["fp8"].append(name)
        scale = weight.abs().amax(1) / 448
        values = (weight / scale[:, None]).to(torch.float8_e4m3fn)
        w = self.stored(f"{name}.weight", values, TensorProto.FLOAT8E4M3FN)
        s = self.stored(f"{name}.weight_scale", scale, TensorProto.FLOAT)
        w = self.op("DequantizeLinear", [w, self.number(1)], name=f"{name}/DQ_weight")
        if name not in self.weight_only:
            g = self.cast(
                self.stored(f"{name}.input_scale", torch.tensor(4.0 / 448), TensorProto.FLOAT)
            )
            zero = self.constant(0.0, TensorProto.FLOAT8E4M3FN)
            codes = self.op("QuantizeLinear", [x, g, zero], name=f"{name}/Quantize")
            x = self.op("DequantizeLinear", [codes, g])
        y = self.op("MatMul", [x, self.op("Transpose", [w], perm=[1, 0])], name=f"{name}/MatMul")
        return self.cast(self.op("Mul", [self.op("Cast", [y], to=TensorProto.FLOAT), s]))

    def fp4_product(self, x: str, name: str, weight: torch.Tensor) -> str:
        self.linears["fp4"].append(name)
        n, k = weight.shape
        packed, scale, global_scale = quantize_weight(weight)
        w = self.stored(f"{name}.weight", packed, TensorProto.FLOAT4E2M1, (n, k))
        s = self.stored(f"{name}.weight_scale", scale, TensorProto.FLOAT8E4M3FN)
        g = self.stored(f"{name}.weight_scale_2", global_scale, TensorProto.FLOAT)
        s = self.cast(self.op("DequantizeLinear", [s, g]))
        w = self.op("DequantizeLinear", [w, s], name=f"{name}/DQ_weight", axis=-1, block_size=16)
        w = self.op("Transpose", [w], perm=[1, 0])
        if name not in self.weight_only:
            x = self.quantized_activation(x, name)
        return self.op("MatMul", [x, w], name=f"{name}/MatMul")

    def modulated(self, x: str, shift: str, scale: str) -> str:
        ones = self.stored("ones", torch.ones(self.hidden, dtype=self.torch_dtype), self.onnx_dtype)
        x = self.op("LayerNormalization", [x, ones], axis=-1, epsilon=1e-6)
        return self.op("Add", [self.op("Mul", [x, self.op("Add", [scale, self.number(1)])]), shift])

    def split_heads(self, x: str) -> str:
        shape = self.integers([0, 0, self.heads, self.hidden // self.heads])
        return self.op("Transpose", [self.op("Reshape", [x, shape])], perm=[0, 2, 1, 3])

    def normalized(self, x: str, name: str) -> str:
        scale = torch.ones(self.hidden // self.heads, dtype=self.torch_dtype)
        return self.op(
            "RMSNormalization", [x, self.stored(name, scale, self.onnx_dtype)],
            axis=-1, epsilon=1e-6,
        )  # fmt: skip

    def query_key_value(self, x: str, prefix: str) -> list[str]:
        q, k, v = (self.split_heads(t) for t in self.op("Split", [x], outputs=3, axis=-1,
                                                        num_outputs=3))  # fmt: skip
        return [self.normalized(q, f"{prefix}.q"), self.normalized(k, f"{prefix}.k"), v]

    def fp8_operand(self, x: str, scale: float) -> str:
        if not self.fp8_attention:
            return x
        s, zero = self.number(scale), self.constant(0.0, TensorProto.FLOAT8E4M3FN)
        return self.op("DequantizeLinear", [self.op("QuantizeLinear", [x, s, zero]), s])

    def rotated(self, x: str) -> str:
        x = self.op("Cast", [x], to=TensorProto.FLOAT)
        return self.cast(self.op("RotaryEmbedding", [x, "cos", "sin"], interleaved=1))

    def attention(self, q: str, k: str, v: str) -> str:
        root = self.number((self.hidden // self.heads) ** -0.25)
        q, k = (self.op("Mul", [self.rotated(t), root]) for t in (q, k))
        k = self.op("Transpose", [k], perm=[0, 1, 3, 2])
        scores = self.op(
            "MatMul", [self.fp8_operand(q, 0.02), self.fp8_operand(k, 0.02)], name="attention/QK"
        )
        weights = self.op("Softmax", [scores], name="attention/Softmax", axis=-1)
        x = self.op(
            "MatMul",
            [self.fp8_operand(weights, 1 / 448), self.fp8_operand(v, 0.02)],
            name="attention/PV",
        )
        return self.op(
            "Reshape",
            [self.op("Transpose", [x], perm=[0, 2, 1, 3]), self.integers([0, 0, self.hidden])],
        )

    def gated(self, x: str, gate: str, update: str, output: str = "") -> str:
        output = output or f"{x}+"
        product = self.op("Mul", [gate, update])
        self.nodes.append(helper.make_node("Add", [x, product], [output], name=f"{output}/Add"))
        return output

    def double(self) -> dict[str, list[object]]:
        d, parts = self.hidden, {}
        for stream in ("img", "txt"):
            x = self.modulated(stream, f"{stream}_mod1_shift", f"{stream}_mod1_scale")
            qkv = self.linear(x, f"{stream}_attn.qkv", d, 3 * d)
            parts[stream] = self.query_key_value(qkv, stream)
        q, k, v = (self.op("Concat", [parts["txt"][i], parts["img"][i]], axis=2) for i in range(3))
        x = self.attention(q, k, v)
        length = self.op(
            "Slice", [self.op("Shape", ["txt"]), self.integers([1]), self.integers([2])]
        )
        one = self.integers([1])
        halves = {
            "txt": self.op("Slice", [x, self.integers([0]), length, one]),
            "img": self.op("Slice", [x, length, self.integers([2**40]), one]),
        }
        for stream, half in halves.items():
            y = self.linear(half, f"{stream}_attn.proj", d, d)
            y = self.gated(stream, f"{stream}_mod1_gate", y)
            h = self.modulated(y, f"{stream}_mod2_shift", f"{stream}_mod2_scale")
            h = self.op("Gelu", [self.linear(h, f"{stream}_mlp.0", d, 4 * d)], approximate="tanh")
            h = self.linear(h, f"{stream}_mlp.2", 4 * d, d)
            self.gated(y, f"{stream}_mod2_gate", h, f"{stream}_out")
        inputs = {"img": ["B", "N", d], "txt": ["B", "T", d]}
        inputs |= {f"{s}_{m}": ["B", 1, d] for s in ("img", "txt") for m in MODULATION}
        return inputs

    def single(self) -> dict[str, list[object]]:
        d = self.hidden
        h = self.linear(self.modulated("x", "mod_shift", "mod_scale"), "linear1", d, 7 * d)
        qkv, mlp = self.op("Split", [h, self.integers([3 * d, 4 * d])], outputs=2, axis=-1)
        x = self.attention(*self.query_key_value(qkv, "x"))
        h = self.op("Concat", [x, self.op("Gelu", [mlp], approximate="tanh")], axis=-1)
        self.gated("x", "mod_gate", self.linear(h, "linear2", 5 * d, d), "x_out")
        return {"x": ["B", "S", d]} | {f"mod_{m}": ["B", 1, d] for m in ("shift", "scale", "gate")}


def graph_values(graph: BlockGraph) -> tuple[list[onnx.ValueInfoProto], ...]:
    """Emit the block's nodes; return the graph's inputs and outputs."""
    double = graph.block.startswith("double")
    shapes = graph.double() if double else graph.single()
    half = graph.hidden // graph.heads // 2
    values = [helper.make_tensor_value_info(n, graph.onnx_dtype, s) for n, s in shapes.items()]
    rotary = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", "S", half])
        for n in ("cos", "sin")
    ]
    outputs = [
        helper.make_tensor_value_info(f"{n}_out", graph.onnx_dtype, shapes[n])
        for n in (("img", "txt") if double else ("x",))
    ]
    return values + rotary, outputs


def external(name: str, dtype: int, shape, location: str, offset: int, length: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=dtype, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write_blocks(
    folder: Path,
    depth: int = 1,
    depth_single: int = 1,
    hidden: int = 128,
    heads: int = 2,
    seed: int = 0,
    checkpoint_digest: str = "c0ffee",
    **options: object,
) -> Path:
    """Write `tiny.safetensors` and one ONNX file per block into `folder`."""
    blocks = [f"double_blocks.{i}" for i in range(depth)]
    blocks += [f"single_blocks.{i}" for i in range(depth_single)]
    graphs = [
        BlockGraph(block, hidden, heads, seed=seed + i, **options) for i, block in enumerate(blocks)
    ]
    values = [graph_values(graph) for graph in graphs]
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "tiny.safetensors"
    save_file({k: v for graph in graphs for k, v in graph.tensors.items()}, weights)
    for graph, (inputs, outputs) in zip(graphs, values, strict=True):
        model = stored_model(graph, inputs, outputs, weights)
        metadata = {
            "contract": "3",
            "block": graph.block,
            "kind": graph.block.split("_")[0],
            "hidden_size": str(hidden),
            "num_heads": str(heads),
            "high_precision": graph.high_precision,
            "fp4_linears": json.dumps(graph.linears["fp4"]),
            "fp8_linears": json.dumps(graph.linears["fp8"]),
            "fp8_attention": "1" if graph.fp8_attention else "0",
            "depth": str(depth),
            "depth_single_blocks": str(depth_single),
            "checkpoint_digest": checkpoint_digest,
            "recipe": "nvfp4-max",
        }
        helper.set_model_props(model, {f"flux_fp4.{k}": v for k, v in metadata.items()})
        (folder / f"{graph.block}.onnx").write_bytes(model.SerializeToString())
    return folder


def stored_model(
    graph: BlockGraph,
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: Path,
) -> onnx.ModelProto:
    """Assemble a model whose stored initializers are byte ranges of `weights`."""
    ranges = byte_ranges(weights)
    stored = [
        external(name, dtype, shape, weights.name, *ranges[f"{graph.block}.{name}"])
        for name, (dtype, shape) in graph.initializers.items()
    ]
    return helper.make_model(
        helper.make_graph(graph.nodes, "g", inputs, outputs, stored + graph.small),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)],
        ir_version=11,
    )


def byte_ranges(weights: Path) -> dict[str, tuple[int, int]]:
    """Return offset and length in the file of every tensor of a safetensors file."""
    with weights.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        key: (
            8 + size + value["data_offsets"][0],
            value["data_offsets"][1] - value["data_offsets"][0],
        )
        for key, value in header.items()
        if key != "__metadata__"
    }
