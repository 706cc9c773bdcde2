"""Checkpoints, ours and others', with anything changed: only this package's errors come out."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from checkpoint_layouts import diffusers_state, save_sharded
from flux_fp4.quant.checkpoint_writer import CheckpointWriter
from flux_fp4.quant.errors import QuantError
from flux_fp4.quant.errors.files import QuantizedCheckpointError
from flux_fp4.quant.flux.config import block_linears, plan_shapes
from flux_fp4.quant.flux.model import tensor_shapes
from flux_fp4.quant.onnx_export import export_blocks, exported_blocks
from flux_fp4.quant.onnx_export.blocks import block_model
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint, is_in_plan
from flux_fp4.quant.sources.source import open_source
from flux_fp4.quant.summary import quantized_summary
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import changed_json, damaged_bytes
from quantize_tiny import quantize, with_recipe
from safetensors.torch import save
from tiny_flux import TINY_VARIANTS, ignore_progress, random_flux, save_flux

pytestmark = pytest.mark.usefixtures("bounded_memory")


def parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def opened_without_surprise(path: Path) -> None:
    """Open a checkpoint; what is accepted can be read in full."""
    try:
        source = open_source(path)
        names = list(source.shapes)
        loaded = source.tensors(names)
    except QuantError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert {name: tuple(value.shape) for name, value in loaded.items()} == source.shapes
        assert len(source.digest()) == 64
    assert len(refusal) < 2000


@pytest.fixture(scope="module")
def flux() -> bytes:
    return save({name: value.bfloat16() for name, value in random_flux().state_dict().items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


@given(data=st.data())
def test_safetensors_file_with_damaged_bytes(flux: bytes, folder: Path, data: Any) -> None:
    path = folder / "damaged.safetensors"
    (length,) = struct.unpack("<Q", flux[:8])
    head = data.draw(damaged_bytes(flux[: 8 + length]))
    path.write_bytes(head + flux[8 + length :])
    opened_without_surprise(path)


@given(data=st.data())
def test_safetensors_header_with_changed_values(flux: bytes, folder: Path, data: Any) -> None:
    path = folder / "changed.safetensors"
    header, tensors = parts(flux)
    header["__metadata__"] = {"format": "pt", "_quantization_metadata": '{"layers": {}}'}
    path.write_bytes(joined(data.draw(changed_json(header)), tensors))
    opened_without_surprise(path)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    state = {name: value.bfloat16() for name, value in random_flux().state_dict().items()}
    path = save_sharded(diffusers_state(state), tmp_path_factory.mktemp("repo") / "transformer")
    return path, path.read_bytes()


@given(data=st.data())
def test_shard_index(index: tuple[Path, bytes], data: Any) -> None:
    path, valid = index
    as_json = changed_json(json.loads(valid)).map(lambda value: json.dumps(value).encode())
    path.write_bytes(data.draw(as_json | damaged_bytes(valid)))
    opened_without_surprise(path)


def test_shard_of_a_name_that_no_disk_takes(index: tuple[Path, bytes]) -> None:
    path, valid = index
    entries = json.loads(valid)
    for name in ("x" * 5000 + ".safetensors", "\ud800.safetensors"):
        entries["weight_map"] = dict.fromkeys(entries["weight_map"], name)
        path.write_text(json.dumps(entries))
        with pytest.raises(QuantError, match=r"which is not a|is not in 'transformer'"):
            open_source(path)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("quantized")
    source = save_flux(random_flux(), folder / "source.safetensors")
    path = folder / "q" / "q.safetensors"
    quantize(source, path, with_recipe("nvfp4-svdquant-r16"), statistics=folder / "statistics")
    return path, path.read_bytes()


def used_without_surprise(path: Path) -> None:
    """Read a quantized checkpoint; what is accepted can be reported on and exported."""
    try:
        checkpoint = QuantizedCheckpoint.read(path)
    except QuantizedCheckpointError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert quantized_summary(checkpoint)
        for block in checkpoint.metadata.block_names:
            for linear in block_linears(block):
                shape = plan_shapes(checkpoint.metadata.config, block)[f"{linear}.weight"]
                assert checkpoint.linear_shape(f"{block}.{linear}") == shape
        blocks = checkpoint.metadata.block_names
        for block in (blocks[0], blocks[-1]):
            assert ir.to_proto(block_model(checkpoint, block)).graph.node
    assert len(refusal) < 2000


@settings(max_examples=60)
@given(data=st.data())
def test_quantized_checkpoint_with_changed_header(quantized: tuple[Path, bytes], data: Any) -> None:
    path, valid = quantized
    header, tensors = parts(valid)
    path.write_bytes(joined(data.draw(changed_json(header)), tensors))
    used_without_surprise(path)


@settings(max_examples=60)
@given(data=st.data())
def test_quantized_checkpoint_with_changed_metadata(
    quantized: tuple[Path, bytes], data: Any
) -> None:
    path, valid = quantized
    header, tensors = parts(valid)
    metadata = json.loads(header["__metadata__"]["flux_fp4"])
    # most values are of the reports: what decides stands beside them
    short = {**metadata, "linears": metadata["linears"][:1], "blocks": metadata["blocks"][:1]}
    header["__metadata__"]["flux_fp4"] = json.dumps(data.draw(changed_json(short)))
    path.write_bytes(joined(header, tensors))
    used_without_surprise(path)


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"depth": 10**9}},
        {"config": {"hidden_size": 2**40}},
        {"config": {"num_heads": 0}},
        {"config": {"mlp_ratio": 3.0}},
        {"config": {"qkv_bias": False, "bias": False, "hidden_size": 384}},
        {"source_bytes": 0},
        {"source_bytes": 2**60},
        {"base_digest": "0" * 64, "blocks": [{"name": "../x", "update_sqnr_db": 1.0}]},
        {"high_precision": "fp16"},
    ],
    ids=str,
)
def test_metadata_that_contradicts_the_tensors(
    quantized: tuple[Path, bytes], change: dict[str, Any]
) -> None:
    path, valid = quantized
    header, tensors = parts(valid)
    metadata = json.loads(header["__metadata__"]["flux_fp4"])
    config = metadata["config"] | change.get("config", {})
    header["__metadata__"]["flux_fp4"] = json.dumps(metadata | change | {"config": config})
    path.write_bytes(joined(header, tensors))
    with pytest.raises(QuantizedCheckpointError):
        QuantizedCheckpoint.read(path)


@pytest.mark.parametrize("variant", TINY_VARIANTS)
def test_shapes_of_plans_are_those_of_the_model(variant: str) -> None:
    config = TINY_VARIANTS[variant]
    found = {
        f"{block}.{part}": shape
        for block in config.block_names
        for part, shape in plan_shapes(config, block).items()
    }
    assert found == {n: shape for n, shape in tensor_shapes(config).items() if is_in_plan(n)}


def test_damaged_export_is_none(quantized: tuple[Path, bytes]) -> None:
    path, valid = quantized
    path.write_bytes(valid)
    file = export_blocks(path, ignore_progress)[0]
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(QuantError, match="damaged"):
        exported_blocks(path)


LAYOUT = dict.fromkeys(("a", "b", "c"), (torch.uint8, (64,)))


@given(data=st.data())
def test_journal(folder: Path, data: Any) -> None:
    path = folder / "work.safetensors"
    journal = folder / ".work.journal"
    # leaving without `finish` keeps the parts, as a cancel does
    with CheckpointWriter(path, LAYOUT, "job") as writer:
        for value, name in enumerate(LAYOUT):
            writer.add(name, torch.full((64,), value, dtype=torch.uint8))
            writer.finish_part(name, {"linears": [value]})
    valid = journal.read_bytes()
    journal.write_bytes(data.draw(damaged_bytes(valid)))
    with CheckpointWriter(path, LAYOUT, "job") as writer:
        finished = list(writer.finished.items())
        assert finished == [(n, {"linears": [i]}) for i, n in enumerate(LAYOUT)][: len(finished)]
        writer.finished.clear()
    assert not journal.exists()
