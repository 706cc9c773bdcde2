"""Checkpoints made to hurt: refused with an error that names the file, fast, in little memory."""

from __future__ import annotations

import json
import resource
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import diffusers_state, save_sharded
from flux_fp4.quant.errors import QuantError
from flux_fp4.quant.errors.sources import DamagedCheckpointError, UnknownCheckpointError
from flux_fp4.quant.safetensors_header import MAX_HEADER_BYTES
from flux_fp4.quant.sources.source import open_source
from safetensors.torch import save
from tiny_flux import random_flux

MAX_SECONDS = 10.0
"""A refusal takes milliseconds; the bound is for a busy machine."""

MAX_GROWTH = 300 * 2**20
"""Of Python's allocations and of the process: parsed JSON of the longest header that is read."""


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return {name: value.bfloat16() for name, value in random_flux().state_dict().items()}


@pytest.fixture(scope="module")
def flux(state: dict[str, torch.Tensor]) -> bytes:
    """A whole tiny FLUX as a safetensors file."""
    return save(state)


@pytest.fixture(autouse=True)
def cheap() -> Iterator[None]:
    """Require every attack to cost little time and memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    started = time.monotonic()
    yield
    seconds = time.monotonic() - started
    grown = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    grown = max(grown, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak))
    assert seconds < MAX_SECONDS, f"{seconds:.1f} s"
    assert grown < MAX_GROWTH, f"{grown / 2**20:.0f} MiB"


def parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def joined(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(content: bytes, folder: Path) -> QuantError:
    path = folder / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises((DamagedCheckpointError, UnknownCheckpointError)) as caught:
        open_source(path)
    assert "'bad.safetensors'" in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert path.read_bytes() == content
    return caught.value


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, -1, -100, -100_000])
def test_truncated_file(flux: bytes, tmp_path: Path, size: int) -> None:
    refused(flux[:size], tmp_path)


def test_bytes_behind_the_last_tensor(flux: bytes, tmp_path: Path) -> None:
    assert "behind its last tensor" in str(refused(flux + b"x", tmp_path))


@pytest.mark.parametrize(
    "length", [2**64 - 1, 2**63, 2**40, 100_000_000, MAX_HEADER_BYTES + 1], ids=hex
)
def test_header_length_beyond_the_file(tmp_path: Path, length: int) -> None:
    assert "claims" in str(refused(struct.pack("<Q", length) + b"{}", tmp_path))


def test_long_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**32) + b"{")
        file.truncate(2**33)  # sparse: takes no disk
    with pytest.raises(DamagedCheckpointError, match="its header has 4294967296 bytes, the limit"):
        open_source(path)


def filled(start: str, repeated: str, end: str) -> bytes:
    count = (MAX_HEADER_BYTES - len(start) - len(end)) // len(repeated)
    return (start + repeated * count + end).encode()


HEADERS = {
    "not-json": b"{" * 100,
    "not-utf8": b'{"\xff\xfe": 1}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "list": b"[]",
    "number": b"1",
    "null-entry": b'{"img_in.weight": null}',
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "many-lists": filled('{"a": [', "[],", "[]]}"),
    "many-objects": filled('{"a": [', '{"b":1},', "1]}"),
    "many-dimensions": filled(
        '{"a": {"dtype": "U8", "data_offsets": [0, 0], "shape": [', "9,", "0]}}"
    ),
    "long-number": b'{"a": {"dtype": "U8", "data_offsets": [0, 1], "shape": ['
    + b"9" * 10**6
    + b"]}}",
    "long-name": b'{"' + b"x" * 10**6 + b'": 3}',
    "metadata-list": b'{"__metadata__": [1]}',
    "metadata-number": b'{"__metadata__": {"a": 1}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_hostile_header(tmp_path: Path, header: bytes) -> None:
    refused(joined(header), tmp_path)


def test_name_that_occurs_twice(flux: bytes, tmp_path: Path) -> None:
    header, data = parts(flux)
    twice = (
        json.dumps(header)[:-1] + ', "img_in.weight": ' + json.dumps(header["img_in.bias"]) + "}"
    )
    assert "holds 'img_in.weight' twice" in str(refused(joined(twice.encode(), data), tmp_path))


ENTRIES: dict[str, dict[str, Any]] = {
    "negative-shape": {"shape": [-256, -64]},
    "negative-zero-product": {"shape": [-256, 0]},
    "huge-shape": {"shape": [2**62, 2**62]},
    "huge-and-zero": {"shape": [2**70, 0]},
    "fraction": {"shape": [256.0, 64]},
    "boolean": {"shape": [True, 64]},
    "text-shape": {"shape": "256"},
    "other-shape": {"shape": [256, 65]},
    "other-dtype": {"dtype": "F32"},
    "unknown-dtype": {"dtype": "Q4_K"},
    "list-dtype": {"dtype": ["BF16"]},
    "negative-offset": {"data_offsets": [-32768, 0]},
    "reversed": {"data_offsets": [32768, 0]},
    "beyond": {"data_offsets": [2**40, 2**40 + 32768]},
    "huge-offset": {"data_offsets": [2**64, 2**64 + 32768]},
    "three-offsets": {"data_offsets": [0, 1, 2]},
    "overlap": {"data_offsets": [2, 32770]},
    "more-keys": {"location": "/etc/passwd"},
}


@pytest.mark.parametrize("change", ENTRIES.values(), ids=ENTRIES.keys())
def test_hostile_entry_names_the_tensor(
    flux: bytes, tmp_path: Path, change: dict[str, Any]
) -> None:
    header, data = parts(flux)
    header["img_in.weight"] |= change
    assert "img_in.weight" in str(refused(joined(header, data), tmp_path))


def test_gap_between_tensors(flux: bytes, tmp_path: Path) -> None:
    header, data = parts(flux)
    last = max(header, key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [place + 64 for place in header[last]["data_offsets"]]
    assert "64 bytes before" in str(refused(joined(header, data + bytes(64)), tmp_path))


def test_thousands_of_blocks(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    header: dict[str, Any] = {}
    data = 0
    shapes = {name: list(value.shape) for name, value in state.items()}
    for block in range(3000):
        for name in ("norm.key_norm.scale", "linear2.bias"):
            header[f"single_blocks.{block}.{name}"] = [1]
    for name, shape in {**{key: [1] for key in header}, **shapes}.items():
        length = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [data, data + length]}
        data += length
    assert "3001 blocks, the limit" in str(refused(joined(header, bytes(data)), tmp_path))


def test_widths_that_overflow(flux: bytes, tmp_path: Path) -> None:
    header, data = parts(flux)
    for name, shape in (("txt_in.weight", [0, 2**62]), ("vector_in.in_layer.weight", [0, 2**62])):
        begin = header[name]["data_offsets"][0]
        end = header[name]["data_offsets"][1]
        header[f"{name}.rest"] = {**header[name]}
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, begin]}
        assert end > begin
    assert "empty shape" in str(refused(joined(header, data), tmp_path))


@pytest.fixture
def index(state: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """The index of a sharded tiny FLUX, with a file of the same content outside its folder."""
    path = save_sharded(diffusers_state(state), tmp_path / "repo" / "transformer")
    shard = next(path.parent.glob("*00001*"))
    (tmp_path / "repo" / "outside.safetensors").write_bytes(shard.read_bytes())
    return path


def refused_index(index: Path) -> DamagedCheckpointError:
    with pytest.raises(DamagedCheckpointError) as caught:
        open_source(index)
    assert f"'{index.name}'" in str(caught.value)
    assert len(str(caught.value)) < 2000
    return caught.value


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "..\\outside.safetensors",
        "sub/../../outside.safetensors",
        "./diffusion_pytorch_model-00001-of-00003.safetensors",
        "/etc/passwd",
        "/etc/passwd.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "\\\\server\\share\\x.safetensors",
        "file:///etc/x.safetensors",
        "x.safetensors:stream.safetensors",
        "x\0.safetensors",
        "x\n.safetensors",
        "..",
        "",
        ".safetensors",
        "model.bin",
        "model.ckpt",
    ],
)
def test_index_that_leads_out_of_its_folder(index: Path, name: str) -> None:
    entries = json.loads(index.read_text())
    entries["weight_map"] = dict.fromkeys(entries["weight_map"], name)
    index.write_text(json.dumps(entries))
    assert repr(name) in str(refused_index(index))


def test_shard_that_is_a_link_out_of_its_folder(index: Path) -> None:
    shard = next(index.parent.glob("*00001*"))
    shard.unlink()
    shard.symlink_to(index.parents[1] / "outside.safetensors")
    assert "is a link to another folder" in str(refused_index(index))


def test_shard_that_is_a_folder_or_a_loop(index: Path) -> None:
    shard = next(index.parent.glob("*00001*"))
    shard.unlink()
    shard.mkdir()
    assert "is not in 'transformer'" in str(refused_index(index))
    shard.rmdir()
    shard.symlink_to(shard)
    assert "is not in 'transformer'" in str(refused_index(index))


INDEXES = {
    "empty": b"",
    "not-json": b"{",
    "list": b"[]",
    "no-map": b"{}",
    "empty-map": b'{"weight_map": {}}',
    "list-map": b'{"weight_map": []}',
    "number": b'{"weight_map": {"a": 1}}',
    "nested": b'{"weight_map": {"a": {"b": "c"}}}',
    "twice": b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
    "deep": b'{"weight_map": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "many-shards": filled('{"weight_map": {"a": "b.safetensors"', ' ,"a":1', "}}"),
}


@pytest.mark.parametrize("text", INDEXES.values(), ids=INDEXES.keys())
def test_hostile_index(index: Path, text: bytes) -> None:
    index.write_bytes(text)
    refused_index(index)


def test_long_index_is_not_read(index: Path) -> None:
    with index.open("wb") as file:
        file.truncate(2**33)
    assert "8589934592 bytes, the limit" in str(refused_index(index))


def test_shard_with_a_hostile_header(index: Path) -> None:
    shard = next(index.parent.glob("*00001*"))
    shard.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert "00001" in str(refused_index(index))


def test_header_mark_with_a_hostile_text(flux: bytes, tmp_path: Path) -> None:
    header, data = parts(flux)
    for text in ("[" * 100_000, '{"layers": {' + '"a": {}, ' * 2 + '"b": {}}}'):
        header["__metadata__"] = {"_quantization_metadata": text}
        refused(joined(header, data), tmp_path)
