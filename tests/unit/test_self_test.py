"""The self-test against blocks that compute rightly, a little otherwise, and wrongly."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from flux_fp4.quant.emulation import emulated_block
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_SPEC
from flux_fp4.trt_runtime.adapters import LowRank
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.errors.run import SelfTestError
from flux_fp4.trt_runtime.manifest import load_manifest
from flux_fp4.trt_runtime.reference import ReferenceExecutor
from flux_fp4.trt_runtime.selection import Selection
from flux_fp4.trt_runtime.self_test import LIMIT_DB, Machine, SelfTest
from quantize_tiny import quantize
from stored_block import high_precision_block
from tiny_flux import ignore_progress, random_flux, save_flux
from torch import Tensor

HERE = Machine("NVIDIA GeForce RTX 5090", "581.15", "tensorrt_rtx 1.7")
CPU = torch.device("cpu")
DOUBLE, SINGLE = "double_blocks.0", "single_blocks.0"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    folder = tmp_path_factory.mktemp("model")
    source = save_flux(random_flux(), folder / "source.safetensors")
    result = quantize(source, folder / "tiny" / "tiny.safetensors")
    export_blocks(result.path, ignore_progress)
    build_engine(result.path.parent, SMALL_SPEC, ignore_progress)
    return result


@pytest.fixture
def engine_dir(checkpoint: QuantizedCheckpoint, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint.path.parent, tmp_path / "tiny")
    return tmp_path / "tiny" / SMALL_SPEC.folder_name


class Device(ReferenceExecutor):
    """The reference in the place of a GPU, with a fault."""

    machine = HERE  # type: ignore[assignment]

    def __init__(self, folder: Path, fault: str = "") -> None:
        super().__init__(folder)
        self.fault = fault
        self.used: list[Selection] = []
        self.runs = 0

    def use(self, selection: Selection) -> None:
        self.used.append(selection)
        super().use(selection)

    def run(self, block: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.runs += 1
        outputs = super().run(block, inputs)
        if self.fault == "black":
            return {name: torch.zeros_like(value) for name, value in outputs.items()}
        if self.fault == "nothing added":
            return {name: inputs[name.removesuffix("_out")] for name in outputs}
        if self.fault == "NaN":
            return {name: value * torch.nan for name, value in outputs.items()}
        if self.fault == "one stream":
            return {
                name: value.flip(1) if name == "txt_out" else value
                for name, value in outputs.items()
            }
        return outputs


def engine_on(device: Device, engine_dir: Path) -> Engine:
    manifest = load_manifest(engine_dir)
    test = SelfTest(engine_dir, manifest)
    return Engine(engine_dir, manifest, device, "tensorrt_rtx", "", test)


def test_right_results_pass_once(engine_dir: Path) -> None:
    device = Device(engine_dir.parent)
    engine = engine_on(device, engine_dir)
    engine.load(CPU)
    assert device.runs == 2  # a double and a single block
    engine.unload()
    engine.load(CPU)
    again = Device(engine_dir.parent)
    engine_on(again, engine_dir).load(CPU)
    assert (device.runs, again.runs) == (2, 0)


@pytest.mark.parametrize("fault", ["black", "nothing added", "NaN", "one stream"])
def test_wrong_results_are_refused_with_a_report(engine_dir: Path, fault: str) -> None:
    device = Device(engine_dir.parent, fault)
    engine = engine_on(device, engine_dir)
    with pytest.raises(SelfTestError) as caught:
        engine.load(CPU)
    assert not engine.loaded
    assert caught.value.block == DOUBLE or fault != "one stream"
    assert caught.value.db < 4
    report = json.loads((engine_dir / "self_test_failed.json").read_text())
    assert report["gpu"] == HERE.gpu
    assert report["driver"] == HERE.driver
    assert report["update_sqnr_db"].keys() == {DOUBLE, SINGLE}
    assert report["engine"] == "tiny/sm120"
    # it is tested again, and used once it computes rightly
    device.fault = ""
    engine.load(CPU)
    assert engine.loaded


@pytest.mark.parametrize("part", ["gpu", "driver", "library"])
def test_another_machine_is_tested_anew(engine_dir: Path, part: str) -> None:
    device = Device(engine_dir.parent)
    engine_on(device, engine_dir).load(CPU)
    other = Device(engine_dir.parent)
    machine = copy.copy(HERE)
    object.__setattr__(machine, part, "another")
    other.machine = machine  # type: ignore[assignment]
    engine_on(other, engine_dir).load(CPU)
    assert other.runs == 2


def test_other_plans_are_tested_anew(engine_dir: Path) -> None:
    engine_on(Device(engine_dir.parent), engine_dir).load(CPU)
    manifest = load_manifest(engine_dir)
    first, *rest = manifest.blocks
    changed = manifest.model_copy(
        update={"blocks": (first.model_copy(update={"digest": "0" * 64}), *rest)}
    )
    assert SelfTest(engine_dir, manifest).has_passed(HERE)
    assert not SelfTest(engine_dir, changed).has_passed(HERE)


def test_adapters_are_put_aside_and_come_back(engine_dir: Path) -> None:
    device = Device(engine_dir.parent)
    engine = engine_on(device, engine_dir)
    adapters = {SINGLE: {"linear2": LowRank(torch.ones(1280, 1), torch.ones(1, 256))}}
    wanted = Selection(adapters, masked=True)
    engine.use(wanted)
    engine.load(CPU)
    assert device.used == [wanted, Selection(), wanted]
    assert engine.selection is wanted


@pytest.mark.parametrize("content", [b"{", b"[]", b"[" * 100_000, b"\xff"])
def test_damaged_record_is_made_again(engine_dir: Path, content: bytes) -> None:
    (engine_dir / "self_test.json").write_bytes(content)
    device = Device(engine_dir.parent)
    engine_on(device, engine_dir).load(CPU)
    assert device.runs == 2
    assert SelfTest(engine_dir, load_manifest(engine_dir)).has_passed(HERE)


def test_plans_without_onnx_are_not_tested(
    engine_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = load_manifest(engine_dir)
    (engine_dir.parent / f"{DOUBLE}.onnx").unlink()
    test = SelfTest(engine_dir, manifest)
    assert test.run(HERE, lambda block, inputs: {}) == {}
    assert "not tested" in caplog.text
    assert not test.has_passed(HERE)


def test_bf16_arithmetic_passes_with_room(
    checkpoint: QuantizedCheckpoint, engine_dir: Path
) -> None:
    """A GPU computes in bf16 what the reference computes in fp32."""

    def run(block: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        module = emulated_block(
            high_precision_block(checkpoint, block), checkpoint.block_tensors(block)
        )
        mods = [value.bfloat16() for name, value in inputs.items() if "mod" in name]
        streams = {n: v.bfloat16() for n, v in inputs.items() if n in ("img", "txt", "x")}
        rotary = (inputs["cos"], inputs["sin"])
        names = list(streams)
        outputs = module.bfloat16()(*streams.values(), *rotary, mods)
        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        return {f"{name}_out": out.float() for name, out in zip(names, outputs, strict=True)}

    results = SelfTest(engine_dir, load_manifest(engine_dir)).run(HERE, run)
    assert set(results) == {DOUBLE, SINGLE}
    assert min(results.values()) > LIMIT_DB + 6, results
