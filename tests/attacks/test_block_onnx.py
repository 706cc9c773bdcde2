"""Block ONNX files that refer to data they must not, or that are not what their metadata says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from flux_fp4.trt_runtime.errors.blocks import BlockContractError
from flux_fp4.trt_runtime.reference import ReferenceExecutor
from flux_fp4.trt_runtime.signature import read_signature
from onnx import TensorProto, helper

Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture
def block(blocks: Callable[..., Path]) -> Path:
    return blocks(depth=0, hidden=64) / "single_blocks.0.onnx"


def refused(block: Path, edit: Edit) -> BlockContractError:
    model = onnx.load(block, load_external_data=False)
    edit(model)
    block.write_bytes(model.SerializeToString())
    with pytest.raises(BlockContractError) as caught:
        read_signature(block)
    with pytest.raises(BlockContractError):
        ReferenceExecutor(block.parent)
    assert "single_blocks.0.onnx" in str(caught.value)
    assert "'Export FLUX FP4 to ONNX'" in str(caught.value)
    return caught.value


def external(model: onnx.ModelProto, key: str, value: str) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value


def prop(model: onnx.ModelProto, key: str, value: str | None) -> None:
    name = f"flux_fp4.{key}"
    kept = {p.key: p.value for p in model.metadata_props if p.key != name}
    del model.metadata_props[:]
    helper.set_model_props(model, kept if value is None else {**kept, name: value})


def move_all(model: onnx.ModelProto, location: str) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location


@pytest.mark.parametrize(
    "location",
    [
        "../tiny.safetensors",
        "/etc/passwd",
        "sub/tiny.safetensors",
        "..\\tiny.safetensors",
        "C:\\tiny.safetensors",
        "C:tiny.safetensors",
        "..",
        "",
        "tiny.safetensors\x00.txt",
    ],
)
def test_weights_outside_the_folder(block: Path, location: str) -> None:
    assert "outside" in refused(block, lambda m: move_all(m, location)).problem


def test_weights_file_that_does_not_exist(block: Path) -> None:
    assert "missing" in refused(block, lambda m: move_all(m, "other.safetensors")).problem


def test_weights_file_that_is_a_folder(block: Path) -> None:
    (block.parent / "folder").mkdir()
    refused(block, lambda m: move_all(m, "folder"))


def test_weights_file_that_is_a_link(block: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((block.parent / "tiny.safetensors").read_bytes())
    (block.parent / "link").symlink_to(secret)
    assert "link" in refused(block, lambda m: move_all(m, "link")).problem


def test_weights_in_two_files(block: Path) -> None:
    (block.parent / "b").write_bytes((block.parent / "tiny.safetensors").read_bytes())
    assert "2 files" in refused(block, lambda m: external(m, "location", "b")).problem


@pytest.mark.parametrize("value", ["-1", "1e3", "0x10", "", "9" * 30, " 1"])
@pytest.mark.parametrize("key", ["offset", "length"])
def test_offset_and_length_must_be_plain_numbers(block: Path, key: str, value: str) -> None:
    assert "offset and length" in refused(block, lambda m: external(m, key, value)).problem


def test_offset_beyond_the_file(block: Path) -> None:
    assert "beyond" in refused(block, lambda m: external(m, "offset", "999999999")).problem


def test_length_that_differs_from_the_shape(block: Path) -> None:
    assert "its shape needs" in refused(block, lambda m: external(m, "length", "8")).problem


def test_truncated_weights_file(block: Path) -> None:
    weights = block.parent / "tiny.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "beyond" in refused(block, lambda m: None).problem


def add_subgraph(model: onnx.ModelProto) -> None:
    empty = helper.make_graph([], "g", [], [])
    model.graph.node.append(
        helper.make_node("If", ["x"], ["y"], name="n", then_branch=empty, else_branch=empty)
    )


def add_external_attribute(model: onnx.ModelProto) -> None:
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(helper.make_node("Constant", [], ["y"], name="n", value=tensor))


def add_function(model: onnx.ModelProto) -> None:
    model.functions.append(
        helper.make_function("trt", "Evil", ["x"], ["y"], [], [helper.make_opsetid("", 24)])
    )


def add_custom_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Evil", ["x"], ["y"], domain="com.evil"))


def add_sparse_weight(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add()


def add_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["B"]))


def change_input(dtype: int, shape: list[object]) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", dtype, shape))

    return edit


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        pytest.param(add_subgraph, "subgraph", id="subgraph"),
        pytest.param(add_external_attribute, "external data", id="external attribute"),
        pytest.param(add_function, "functions", id="function"),
        pytest.param(add_custom_operator, "com.evil::Evil", id="custom operator"),
        pytest.param(add_sparse_weight, "sparse", id="sparse weight"),
        pytest.param(add_input, "mask", id="more inputs"),
        pytest.param(change_input(TensorProto.INT8, ["B", "S", 64]), "type", id="input type"),
        pytest.param(change_input(TensorProto.FLOAT, ["B", "Q", 64]), "shape", id="unknown axis"),
        pytest.param(change_input(TensorProto.FLOAT, ["B", "S", 0]), "shape", id="empty axis"),
        pytest.param(lambda m: prop(m, "contract", "4"), "contract", id="other contract"),
        pytest.param(lambda m: prop(m, "contract", "2"), "contract", id="earlier contract"),
        pytest.param(lambda m: prop(m, "contract", None), "contract", id="no contract"),
        pytest.param(lambda m: prop(m, "block", "single_blocks.1"), "block", id="other block"),
        pytest.param(lambda m: prop(m, "block", "../x"), "block", id="path as block"),
        pytest.param(lambda m: prop(m, "kind", "double"), "kind", id="other kind"),
        pytest.param(lambda m: prop(m, "high_precision", "int8"), "int8", id="precision"),
        pytest.param(lambda m: prop(m, "depth", "-1"), "depth", id="negative depth"),
        pytest.param(lambda m: prop(m, "depth", "9" * 9), "depth", id="huge depth"),
        pytest.param(lambda m: prop(m, "fp8_attention", "yes"), "fp8_attention", id="flag"),
        pytest.param(lambda m: prop(m, "fp4_linears", "[1]"), "fp4_linears", id="names"),
        pytest.param(lambda m: prop(m, "fp4_linears", "[]"), "linear1", id="FP4 not promised"),
        pytest.param(lambda m: prop(m, "fp8_linears", '["x"]'), "'x'", id="FP8 not stored"),
        pytest.param(lambda m: prop(m, "fp8_linears", None), "fp8_linears", id="no FP8 names"),
        pytest.param(lambda m: prop(m, "fp4_linears", "["), "fp4_linears", id="not JSON"),
        pytest.param(lambda m: prop(m, "fp4_linears", "[" * 9999), "fp4_linears", id="deep JSON"),
    ],
)
def test_graph_outside_the_contract(block: Path, edit: Edit, problem: str) -> None:
    assert problem in refused(block, edit).problem


@pytest.mark.parametrize(
    "content", [b"", b"not onnx", b"\x08" * 1000], ids=["empty", "text", "bad"]
)
def test_file_that_is_not_onnx(block: Path, content: bytes) -> None:
    block.write_bytes(content)
    with pytest.raises(BlockContractError):
        read_signature(block)


def test_file_of_unreasonable_size(block: Path) -> None:
    with block.open("r+b") as file:
        file.truncate(17 << 20)
    with pytest.raises(BlockContractError, match="at most"):
        read_signature(block)
