"""Whatever stands in an engine's small files, only this package's errors come out of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flux_fp4.trt_runtime.cleanup import find_unneeded
from flux_fp4.trt_runtime.contract import DYNAMIC_AXES, OUTPUTS, input_names
from flux_fp4.trt_runtime.digest import digest_of_bytes
from flux_fp4.trt_runtime.engine_state import engine_state
from flux_fp4.trt_runtime.errors import EngineError
from flux_fp4.trt_runtime.errors.engine import PlanTruncatedError
from flux_fp4.trt_runtime.manifest import (
    BAKED,
    MANIFEST,
    UNFINISHED,
    VARIANTS,
    EngineManifest,
    check_plan,
    load_manifest,
    read_manifest_file,
    variants_manifest,
    verify_engine,
)
from flux_fp4.trt_runtime.runtime_cache import RuntimeCache, cache_name, cache_owner
from flux_fp4.trt_runtime.self_test_record import RECORD, REPORT, failed_test, passed_tests
from flux_fp4.trt_runtime.spec import RANK_AXIS
from flux_fp4.trt_runtime.variant_plans import built_variants
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import changed_json, damaged_bytes

pytestmark = pytest.mark.usefixtures("bounded_memory")

OWNER = "tensorrt_rtx 1.7 on NVIDIA GeForce RTX 5090, driver 600.1"
CACHE = b"kernels" * 100


@pytest.fixture(scope="module")
def engine(built_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An engine folder of this module's own, with its manifest restored at the end."""
    import shutil

    folder = tmp_path_factory.mktemp("fuzzed") / "tiny"
    shutil.copytree(built_folder, folder)
    return next(path.parent for path in folder.glob(f"*/{MANIFEST}"))


def check_accepted(manifest: EngineManifest, engine: Path) -> None:
    """A manifest that is read holds nothing that later code is not made for."""
    for entry in manifest.blocks:
        assert (engine / entry.file).resolve().parent == engine.resolve()
        assert {spec.name for spec in entry.inputs} == set(input_names(entry.block, entry.kind))
        assert len(entry.inputs) == len({spec.name for spec in entry.inputs})
        assert {spec.name for spec in entry.outputs} == set(OUTPUTS[entry.kind])
        for spec in (*entry.inputs, *entry.outputs):
            assert spec.dtype in ("bf16", "fp16", "fp32")
            for dim in spec.shape:
                if isinstance(dim, str):
                    assert dim in DYNAMIC_AXES or dim.startswith(RANK_AXIS)
                else:
                    assert 0 < dim <= 1 << 20
    try:
        assert manifest.spec.folder_name.isascii()
    except EngineError:
        assert not manifest.targets


def check_engine_files(engine: Path, valid: EngineManifest) -> None:
    """Read a changed manifest in every way that the package does."""
    try:
        manifest = load_manifest(engine)
    except EngineError:
        manifest = None
    if manifest is not None:
        check_accepted(manifest, engine)
        try:
            verify_engine(engine, manifest, None)
        except EngineError:
            pass
        else:
            plans = [(entry.file, entry.bytes, entry.digest) for entry in manifest.blocks]
            assert plans == [(entry.file, entry.bytes, entry.digest) for entry in valid.blocks]
            for entry in manifest.blocks:
                check_plan(engine, entry).close()
    assert engine_state(engine, valid.checkpoint_digest).folder == engine
    assert list(find_unneeded(engine.parent, valid.checkpoint_digest, "600.1", 0.0)) is not None


def first_entry(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**fields, "blocks": [{**fields["blocks"][0], **changes}, *fields["blocks"][1:]]}


@given(data=st.data())
def test_manifest_with_changed_values(engine: Path, built_folder: Path, data: Any) -> None:
    path = engine / MANIFEST
    valid = (built_folder / engine.name / MANIFEST).read_bytes()
    changed = data.draw(changed_json(json.loads(valid)))
    path.write_text(json.dumps(changed))
    check_engine_files(engine, EngineManifest.model_validate_json(valid))


@given(data=st.data())
def test_manifest_with_damaged_bytes(engine: Path, built_folder: Path, data: Any) -> None:
    valid = (built_folder / engine.name / MANIFEST).read_bytes()
    (engine / MANIFEST).write_bytes(data.draw(damaged_bytes(valid)))
    check_engine_files(engine, EngineManifest.model_validate_json(valid))


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": [{"name": "x", "dtype": "int8", "shape": ["B", "S", 64]}]},
        {"outputs": []},
    ],
    ids=str,
)
def test_manifest_values_that_were_accepted_once(engine_copy: Path, changes: Any) -> None:
    path = engine_copy / MANIFEST
    fields = json.loads(path.read_bytes())
    path.write_text(json.dumps(first_entry(fields, **changes)))
    with pytest.raises(EngineError, match=r"blocks\.0"):
        load_manifest(engine_copy)


def test_empty_plan_that_its_manifest_describes(engine_copy: Path) -> None:
    path = engine_copy / MANIFEST
    fields = json.loads(path.read_bytes())
    path.write_text(json.dumps(first_entry(fields, bytes=0, digest=digest_of_bytes(b""))))
    entry = load_manifest(engine_copy).blocks[0]
    (engine_copy / entry.file).write_bytes(b"")
    with pytest.raises(PlanTruncatedError, match="empty"):
        check_plan(engine_copy, entry)


@pytest.mark.parametrize("shape", [["B", "Q", 64], ["B", "S", -1], ["B", "S", 10**12], []])
def test_manifest_with_a_shape_that_no_block_has(engine_copy: Path, shape: Any) -> None:
    path = engine_copy / MANIFEST
    fields = json.loads(path.read_bytes())
    for place in ("inputs", "outputs"):
        specs = fields["blocks"][0][place]
        changed = first_entry(fields, **{place: [{**specs[0], "shape": shape}, *specs[1:]]})
        path.write_text(json.dumps(changed))
        with pytest.raises(EngineError, match=r"blocks\.0"):
            load_manifest(engine_copy)


@pytest.mark.parametrize("name", [UNFINISHED, VARIANTS, BAKED])
@given(data=st.data())
def test_records_beside_the_manifest(
    engine: Path, built_folder: Path, name: str, data: Any
) -> None:
    valid = (built_folder / engine.name / MANIFEST).read_bytes()
    (engine / MANIFEST).write_bytes(valid)
    manifest = EngineManifest.model_validate_json(valid)
    as_json = changed_json(json.loads(valid)).map(lambda value: json.dumps(value).encode())
    (engine / name).write_bytes(data.draw(as_json | damaged_bytes(valid)))
    try:
        check_accepted(read_manifest_file(engine / name), engine)
    except EngineError:
        assert variants_manifest(engine / name, manifest) is None
    for entry in built_variants(engine, manifest).values():
        assert (engine / entry.file).stat().st_size == entry.bytes
    list(find_unneeded(engine.parent, manifest.checkpoint_digest, "600.1", 0.0))
    (engine / name).unlink()


@given(data=st.data())
def test_self_test_record(engine: Path, data: Any) -> None:
    valid = {"0" * 64: {"gpu": "x", "driver": "1", "library": "y", "sqnr_db": {"a": 30.0}}}
    as_json = changed_json(valid).map(lambda value: json.dumps(value).encode())
    content = data.draw(as_json | damaged_bytes(json.dumps(valid).encode()))
    for name in (RECORD, REPORT):
        (engine / name).write_bytes(content)
    assert isinstance(passed_tests(engine), dict)
    assert failed_test(engine) is None or isinstance(failed_test(engine), dict)


class FakeCache:
    """Stands for TensorRT's cache: takes bytes and keeps them."""

    def __init__(self, blob: bytes = b"") -> None:
        self.blob: bytes | None = None
        self.stored = blob

    def serialize(self) -> bytes:
        return self.stored

    def deserialize(self, blob: bytes) -> bool:
        self.blob = blob
        return True


class FakeConfig:
    def __init__(self) -> None:
        self.cache = FakeCache(CACHE)

    def create_runtime_cache(self) -> FakeCache:
        return self.cache

    def set_runtime_cache(self, cache: FakeCache) -> None:
        assert cache is self.cache


@pytest.fixture(scope="module")
def cache_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("cache") / cache_name(OWNER)
    cache = RuntimeCache(path, OWNER)
    cache.attach(FakeConfig())
    cache.save()
    return path, path.read_bytes()


@given(data=st.data())
def test_damaged_runtime_cache_never_reaches_tensorrt(
    cache_file: tuple[Path, bytes], data: Any
) -> None:
    path, valid = cache_file
    path.write_bytes(data.draw(damaged_bytes(valid)))
    config = FakeConfig()
    RuntimeCache(path, OWNER).attach(config)
    assert config.cache.blob in (None, CACHE)
    assert cache_owner(path) is None or isinstance(cache_owner(path), str)


@given(data=st.data())
@example(data=None)
def test_runtime_cache_with_another_header(cache_file: tuple[Path, bytes], data: Any) -> None:
    path, valid = cache_file
    magic, header, blob = valid.split(b"\n", 2)
    fields = json.loads(header)
    changed = {**fields, "owner": ["x"]} if data is None else data.draw(changed_json(fields))
    path.write_bytes(b"\n".join((magic, json.dumps(changed).encode(), blob)))
    config = FakeConfig()
    RuntimeCache(path, OWNER).attach(config)
    is_same = fields.items() <= changed.items()
    assert config.cache.blob == (CACHE if is_same else None)
    assert cache_owner(path) is None or isinstance(cache_owner(path), str)
