"""Blocks and one built engine for the runtime's tests; tests that change files work on a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from flux_fp4.tests.unit.trt_runtime.block_graph import write_blocks
from flux_fp4.tests.unit.trt_runtime.fake_tensorrt import FakeCuda, FakeLibrary, with_fake_plan
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_SPEC, silent
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.executor import TensorRTExecutor
from flux_fp4.trt_runtime.manifest import EngineManifest, load_manifest


@pytest.fixture(scope="session")
def built_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with two blocks and a finished engine; not to be changed."""
    folder = write_blocks(tmp_path_factory.mktemp("models") / "tiny")
    build_engine(folder, SMALL_SPEC, silent)
    return folder


@pytest.fixture
def engine_copy(built_folder: Path, tmp_path: Path) -> Path:
    """A finished engine that the test may change; its ONNX files are in the parent folder."""
    folder = tmp_path / "tiny"
    shutil.copytree(built_folder, folder)
    return folder / SMALL_SPEC.folder_name


@pytest.fixture
def blocks(tmp_path: Path) -> Callable[..., Path]:
    """Write block files into a new folder."""
    return lambda **options: write_blocks(tmp_path / "tiny", **options)


@pytest.fixture
def manifest(engine_copy: Path) -> EngineManifest:
    """The manifest of an engine whose plans are the names of their blocks."""
    manifest = load_manifest(engine_copy)
    return manifest.model_copy(
        update={"blocks": tuple(with_fake_plan(engine_copy, entry) for entry in manifest.blocks)}
    )


@pytest.fixture
def library(manifest: EngineManifest) -> FakeLibrary:
    """A TensorRT that runs such plans."""
    return FakeLibrary(manifest)


@pytest.fixture
def executor(engine_copy: Path, manifest: EngineManifest, library: FakeLibrary) -> TensorRTExecutor:
    """An executor of such an engine."""
    return TensorRTExecutor(engine_copy, manifest, library.backend(), FakeCuda(library.calls))
