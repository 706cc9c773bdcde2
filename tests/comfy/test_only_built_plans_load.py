"""A workflow cannot make ComfyUI open a plan or an ONNX file that no build here vouches for.

The loading node runs in this process; nothing may reach TensorRT or ONNX Runtime before a refusal.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from comfy_in_process import import_comfyui
from flux_fp4.tests.unit.trt_runtime.conftest import built_folder, engine_copy, library, manifest

import_comfyui()

import folder_paths  # noqa: E402
from flux_fp4.nodes import paths  # noqa: E402
from flux_fp4.nodes.errors import NodeError  # noqa: E402
from flux_fp4.nodes.load import LoadEngine  # noqa: E402
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint  # noqa: E402
from flux_fp4.tests.unit.trt_runtime.fake_tensorrt import FakeCuda, FakeLibrary  # noqa: E402
from flux_fp4.trt_runtime.backend import load_backend  # noqa: E402
from flux_fp4.trt_runtime.digest import digest_of_bytes  # noqa: E402
from flux_fp4.trt_runtime.errors import EngineError  # noqa: E402
from flux_fp4.trt_runtime.errors.engine import PlanDigestError  # noqa: E402
from flux_fp4.trt_runtime.executor import TensorRTExecutor  # noqa: E402
from flux_fp4.trt_runtime.manifest import EngineManifest, check_plan, load_manifest  # noqa: E402

__all__ = ["built_folder", "engine_copy", "library", "manifest"]


@pytest.fixture
def engine(engine_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine in a registered folder, the same outside of it, and no way to open either."""
    import onnxruntime

    root = tmp_path / "registered"
    shutil.copytree(engine_copy.parent, root / "tiny")
    folders = {paths.MODEL_FOLDER: ([str(root)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", folders)
    monkeypatch.setattr(LoadEngine, "hidden", SimpleNamespace(unique_id="1"))
    # the engine was built from random blocks; only the digest of their checkpoint matters here
    metadata = SimpleNamespace(content_digest=load_manifest(engine_copy).checkpoint_digest)
    checkpoint = SimpleNamespace(name="tiny", metadata=metadata)
    monkeypatch.setattr(QuantizedCheckpoint, "read", lambda path: checkpoint)

    def opened(*_: object, **__: object) -> None:
        pytest.fail("something was opened")

    monkeypatch.setattr(load_backend("tensorrt_rtx").module, "Runtime", opened)
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    return root / "tiny" / engine_copy.name


def refused(name: str) -> str:
    with pytest.raises((NodeError, EngineError)) as caught:
        LoadEngine.execute(name, "reference")
    return str(caught.value)


@pytest.mark.parametrize("start", ["../", "/", "x/../../", "..\\", "registered/../"])
def test_engine_outside_of_the_registered_folders(engine: Path, tmp_path: Path, start: str) -> None:
    assert (tmp_path / "tiny" / engine.name / "manifest.json").is_file()
    prefix = f"{tmp_path}/" if start == "/" else start
    assert "There is no engine" in refused(f"{prefix}tiny/{engine.name}")


def test_engine_without_a_manifest(engine: Path) -> None:
    (engine / "manifest.json").unlink()
    assert "There is no engine" in refused(f"tiny/{engine.name}")


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../x.plan"},
        {"file": "/x.plan"},
        {"file": "..\\x.plan"},
        {"block": "../../x"},
        {"key": "../" * 21 + "x"},
        {"digest": "0" * 64},
        {"bytes": 1},
        {"onnx_digest": "0" * 64},
    ],
    ids=str,
)
def test_manifest_that_names_something_else(engine: Path, change: dict[str, Any]) -> None:
    fields = json.loads((engine / "manifest.json").read_bytes())
    fields["blocks"][0].update(change)
    (engine / "manifest.json").write_text(json.dumps(fields))
    assert refused(f"tiny/{engine.name}")


def test_plan_of_somebody_else(engine: Path) -> None:
    plan = engine / load_manifest(engine).blocks[0].file
    plan.write_bytes(bytes(plan.stat().st_size))
    assert "digest" in refused(f"tiny/{engine.name}")


def test_plan_that_is_a_link_out_of_the_folder(engine: Path, tmp_path: Path) -> None:
    plan = engine / load_manifest(engine).blocks[0].file
    plan.rename(tmp_path / "x.plan")
    plan.symlink_to(tmp_path / "x.plan")
    assert plan.name in refused(f"tiny/{engine.name}")


def test_what_was_checked_is_what_tensorrt_gets(
    engine_copy: Path, manifest: EngineManifest
) -> None:
    entry = manifest.blocks[0]
    plan = check_plan(engine_copy, entry)
    # as a build replaces it, between the check and the use
    other = engine_copy / "other"
    other.write_bytes(b"evil")
    other.replace(engine_copy / entry.file)
    assert digest_of_bytes(plan) == entry.digest


def test_plan_changed_after_the_engine_was_opened(
    engine_copy: Path, manifest: EngineManifest, library: FakeLibrary
) -> None:
    executor = TensorRTExecutor(engine_copy, manifest, library.backend(), FakeCuda(library.calls))
    plan = engine_copy / manifest.blocks[-1].file
    plan.write_bytes(b"x" * plan.stat().st_size)
    import torch

    with pytest.raises(PlanDigestError):
        executor.load(torch.device("cpu"))
    assert ("deserialize", plan.read_text()) not in library.calls
    assert not executor.loaded
