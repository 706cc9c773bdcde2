"""Block ONNX files with anything changed: refused as such, or as good as the one they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from flux_fp4.tests.unit.trt_runtime.block_graph import write_blocks
from flux_fp4.trt_runtime.errors.blocks import BlockContractError
from flux_fp4.trt_runtime.signature import BlockSignature, read_signature
from hypothesis import given
from hypothesis import strategies as st
from mutations import TEXTS, damaged_bytes
from onnx import TensorProto, helper

pytestmark = pytest.mark.usefixtures("bounded_memory")

LOCATIONS = (*TEXTS, "tiny.safetensors", "./tiny.safetensors", "tiny.safetensors.", "other")
NUMBERS = ("", "0", "-1", "+1", " 1", "1e3", "0x1", "٣", "9" * 15, "9" * 400, "1_0")


@pytest.fixture(scope="module", params=["double_blocks.0", "single_blocks.0"])
def block(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_blocks(tmp_path_factory.mktemp("fuzzed") / "tiny", hidden=64)
    (folder / "other").write_bytes(b"x" * 100)
    return folder / f"{request.param}.onnx"


@pytest.fixture(scope="module")
def valid(block: Path) -> tuple[bytes, BlockSignature]:
    return block.read_bytes(), read_signature(block)


def check(block: Path, content: bytes, valid: BlockSignature) -> BlockSignature | None:
    """Read a changed block; what is accepted refers to the same bytes of the same file."""
    block.write_bytes(content)
    try:
        found = read_signature(block)
    except BlockContractError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert len(refusal) < 2000
        return None
    assert found.weights in (valid.weights, None)
    assert found.block == valid.block
    if found.weights is not None:
        size = found.weights.stat().st_size
        assert all(0 <= r.offset <= r.offset + r.length <= size for r in found.ranges)
        assert all(r.name.encode() for r in found.ranges)
    assert {spec.name for spec in found.inputs} == {spec.name for spec in valid.inputs}
    model = onnx.load_model_from_string(content)
    assert not set(all_external(model)) - {t.name for t in model.graph.initializer}
    return found


def all_external(message: Any) -> Iterator[str]:
    """Yield the name of every tensor with external data, wherever it hides in a message."""
    if isinstance(message, TensorProto) and message.data_location == TensorProto.EXTERNAL:
        yield message.name
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else (value,):
                yield from all_external(part)


@given(data=st.data())
def test_damaged_bytes(block: Path, valid: tuple[bytes, BlockSignature], data: Any) -> None:
    check(block, data.draw(damaged_bytes(valid[0])), valid[1])


@st.composite
def changed_message(draw: st.DrawFn, content: bytes) -> bytes:
    """Change up to three fields of a protobuf message at random places."""
    model = onnx.load_model_from_string(content)
    for _ in range(draw(st.integers(1, 3))):
        message = model
        while True:
            fields = message.DESCRIPTOR.fields
            field = draw(st.sampled_from(list(fields)))
            if field.message_type is None:
                change_scalar(draw, message, field)
                break
            if not field.is_repeated:
                message = getattr(message, field.name)
                message.SetInParent()
                continue
            entries = getattr(message, field.name)
            action = draw(st.sampled_from(("enter", "enter", "enter", "add", "remove", "repeat")))
            if action == "add" or not entries:
                message = entries.add()
                continue
            place = draw(st.integers(0, len(entries) - 1))
            if action == "remove":
                del entries[place]
                break
            if action == "repeat":
                entries.add().CopyFrom(copy.deepcopy(entries[place]))
                break
            message = entries[place]
    return bytes(model.SerializeToString())


def change_scalar(draw: st.DrawFn, message: Any, field: Any) -> None:
    kinds = field.CPPTYPE_STRING, field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE, field.CPPTYPE_ENUM
    if field.cpp_type == kinds[0]:
        texts = st.sampled_from([text for text in TEXTS if text.isprintable()]) | st.text(
            max_size=4
        )
        value: Any = draw(texts.filter(lambda text: "\ud800" not in text))
        value = value.encode() if field.type == field.TYPE_BYTES else value
    elif field.cpp_type in kinds[1:3]:
        value = draw(st.floats(width=32))
    elif field.cpp_type == kinds[3]:
        value = draw(st.sampled_from([entry.number for entry in field.enum_type.values]))
    else:
        numbers = (0, 1, 2, 3, 127) if "32" in str(field.type) else (0, 1, -1, 2**40, 2**62)
        value = draw(st.sampled_from(numbers) | st.integers(0, 2**31 - 1))
        value = bool(value) if field.cpp_type == field.CPPTYPE_BOOL else value
        if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32):
            value = min(value, 2**31 - 1) if value > 0 else 0
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


@given(data=st.data())
def test_changed_fields(block: Path, valid: tuple[bytes, BlockSignature], data: Any) -> None:
    check(block, data.draw(changed_message(valid[0])), valid[1])


@given(location=st.sampled_from(LOCATIONS) | st.text(max_size=8))
def test_every_weight_in_another_file(
    block: Path, valid: tuple[bytes, BlockSignature], location: str
) -> None:
    model = onnx.load_model_from_string(valid[0])
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location.replace("\ud800", "?")
    found = check(block, model.SerializeToString(), valid[1])
    assert found is None or location == "tiny.safetensors"


@given(
    place=st.integers(0, 5),
    entries=st.lists(
        st.tuples(
            st.sampled_from(("location", "offset", "length", "checksum", "basepath")),
            st.sampled_from((*LOCATIONS, *NUMBERS)).filter(lambda text: "\ud800" not in text),
        ),
        max_size=4,
    ),
    keeps=st.booleans(),
)
def test_external_data_stays_in_its_file(
    block: Path,
    valid: tuple[bytes, BlockSignature],
    place: int,
    entries: list[tuple[str, str]],
    keeps: bool,
) -> None:
    model = onnx.load_model_from_string(valid[0])
    tensor = [t for t in model.graph.initializer if t.external_data][place]
    if not keeps:
        del tensor.external_data[:]
    for key, value in entries:
        tensor.external_data.add(key=key, value=value)
    found = check(block, model.SerializeToString(), valid[1])
    if found is not None:
        assert {entry.key: entry.value for entry in tensor.external_data}.keys() == {
            "location",
            "offset",
            "length",
        }


Edit = Callable[[onnx.ModelProto], None]


def first_external(model: onnx.ModelProto) -> TensorProto:
    return next(t for t in model.graph.initializer if t.external_data)


def without_location(model: onnx.ModelProto) -> None:
    tensor = first_external(model)
    kept = [entry for entry in tensor.external_data if entry.key != "location"]
    del tensor.external_data[:]
    tensor.external_data.extend(kept)


def with_two_locations(model: onnx.ModelProto) -> None:
    entries = first_external(model).external_data
    kept = list(entries)
    del entries[:]
    entries.add(key="location", value="../../etc/passwd")
    entries.extend(kept)


def with_base_path(model: onnx.ModelProto) -> None:
    first_external(model).external_data.add(key="basepath", value="/etc")


def with_overflowing_shape(model: onnx.ModelProto) -> None:
    first_external(model).dims.extend([2**62] * 30)


def with_a_million_dimensions(model: onnx.ModelProto) -> None:
    first_external(model).dims.extend([2**62] * 1_000_000)


def with_other_digits(model: onnx.ModelProto) -> None:
    entries = first_external(model).external_data
    length = next(entry for entry in entries if entry.key == "length")
    length.value = "".join(chr(0x660 + int(digit)) for digit in length.value)


def outside() -> TensorProto:
    tensor = TensorProto(name="evil", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def with_sparse_attribute(model: onnx.ModelProto) -> None:
    node = model.graph.node.add(op_type="Constant", name="n", output=["y"])
    attribute = node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(outside())


def with_training(model: onnx.ModelProto) -> None:
    model.training_info.add().algorithm.initializer.append(outside())


def with_function_default(model: onnx.ModelProto) -> None:
    quantizer = helper.make_function(
        "trt", "TRT_FP4DynamicQuantize", ["x"], ["y"], [], [helper.make_opsetid("", 24)]
    )
    quantizer.attribute_proto.add(name="a").t.CopyFrom(outside())
    model.functions.append(quantizer)


def with_two_inputs_of_a_name(model: onnx.ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


@pytest.mark.parametrize(
    "edit",
    [
        without_location,
        with_two_locations,
        with_base_path,
        with_overflowing_shape,
        with_a_million_dimensions,
        with_other_digits,
        with_sparse_attribute,
        with_training,
        with_function_default,
        with_two_inputs_of_a_name,
    ],
    ids=lambda edit: edit.__name__,
)
def test_edits_that_were_accepted_or_broke_the_reader(
    block: Path, valid: tuple[bytes, BlockSignature], edit: Edit
) -> None:
    model = onnx.load_model_from_string(valid[0])
    edit(model)
    assert check(block, model.SerializeToString(), valid[1]) is None


def test_text_that_is_not_utf8(block: Path, valid: tuple[bytes, BlockSignature]) -> None:
    assert check(block, valid[0].replace(b"nvfp4-max", b"nvfp4-m\xff\xfe"), valid[1]) is None
