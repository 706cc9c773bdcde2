"""What quant/ exports, trt_runtime/ builds and runs: the two meet in files only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flux_fp4.quant.flux.config import FluxConfig, block_linears
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.tests.unit.trt_runtime.block_inputs import block_inputs
from flux_fp4.tests.unit.trt_runtime.small_spec import SMALL_SPEC
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.engine import Engine
from flux_fp4.trt_runtime.signature import read_block_folder
from mixed_checkpoint import FORMATS, linears_in_plans, save_mixed
from quantize_tiny import quantize
from tiny_flux import TINY, TINY_FLUX2, ignore_progress, random_flux, save_flux


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    folder = tmp_path_factory.mktemp("model")
    source = save_flux(random_flux(), folder / "source.safetensors")
    path = folder / "tiny" / "tiny.safetensors"
    result = quantize(source, path)
    export_blocks(path, ignore_progress)
    return result


def test_signature_reads_what_the_exporter_wrote(checkpoint: QuantizedCheckpoint) -> None:
    signatures = read_block_folder(checkpoint.path.parent)
    assert [s.block for s in signatures] == list(TINY.block_names)
    for signature in signatures:
        assert set(signature.fp4_linears) == set(block_linears(signature.block))
        assert signature.fp8_attention
        assert signature.weights == checkpoint.path
        assert signature.checkpoint_digest == checkpoint.metadata.content_digest
        assert signature.recipe == checkpoint.metadata.recipe
        assert (signature.hidden_size, signature.num_heads) == (TINY.hidden_size, TINY.num_heads)
        for place in signature.ranges:
            stored = checkpoint.tensors.get(f"{signature.block}.{place.name}")
            assert stored is not None
            assert (stored.offset, stored.length) == (place.offset, place.length)


def test_exported_blocks_become_fp4_plans_and_run(checkpoint: QuantizedCheckpoint) -> None:
    folder = checkpoint.path.parent
    manifest = build_engine(folder, SMALL_SPEC, ignore_progress)
    assert [entry.fp4_gemms_found for entry in manifest.blocks] == [8, 2, 2]
    assert [entry.fp8_mha_found for entry in manifest.blocks] == [1, 1, 1]
    assert manifest.checkpoint_digest == checkpoint.metadata.content_digest
    engine = Engine.open(folder / SMALL_SPEC.folder_name, "reference")
    engine.load(torch.device("cpu"))
    for entry in manifest.blocks:
        inputs = block_inputs(entry, img_tokens=36, txt_tokens=5, batch=2)
        for result in engine.run(entry.block, inputs).values():
            assert result.isfinite().all()
    engine.unload()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("config", [TINY, TINY_FLUX2], ids=["FLUX.1", "FLUX.2"])
def test_every_format_builds_for_its_oldest_target_and_runs(
    tmp_path: Path, config: FluxConfig, kind: str
) -> None:
    model = random_flux(config)
    path = tmp_path / "tiny.safetensors"
    attention = kind != "bf16"
    formats = dict.fromkeys(linears_in_plans(model), kind)
    save_mixed(model, path, formats, fp8_attention=attention)
    export_blocks(path, ignore_progress)
    target = {"fp8": "sm89", "bf16": "sm86"}.get(kind, "sm120")
    manifest = build_engine(tmp_path, replace(SMALL_SPEC, targets=(target,)), ignore_progress)
    linears = [len(block_linears(block)) for block in config.block_names]
    none = [0] * len(linears)
    fp4 = [entry.fp4_gemms_found for entry in manifest.blocks]
    assert fp4 == (linears if kind.startswith("nvfp4") else none)
    assert [entry.fp8_gemms_found for entry in manifest.blocks] == (
        linears if kind == "fp8" else none
    )
    assert [entry.fp8_mha_found for entry in manifest.blocks] == [int(attention)] * len(linears)
    engine = Engine.open(tmp_path / target, "reference")
    engine.load(torch.device("cpu"))
    for entry in manifest.blocks:
        inputs = block_inputs(entry, img_tokens=36, txt_tokens=5, batch=2)
        for result in engine.run(entry.block, inputs).values():
            assert result.isfinite().all()
    engine.unload()


def test_mixed_formats_in_one_block_build(tmp_path: Path) -> None:
    model = random_flux()
    formats = {
        name: FORMATS[index % len(FORMATS)] for index, name in enumerate(linears_in_plans(model))
    }
    save_mixed(model, tmp_path / "tiny.safetensors", formats)
    export_blocks(tmp_path / "tiny.safetensors", ignore_progress)
    manifest = build_engine(tmp_path, SMALL_SPEC, ignore_progress)
    for entry in manifest.blocks:
        own = [formats[f"{entry.block}.{linear}"] for linear in block_linears(entry.block)]
        fp4 = sum(kind.startswith("nvfp4") for kind in own)
        assert (entry.fp4_gemms_found, entry.fp8_gemms_found) == (fp4, own.count("fp8"))


@pytest.mark.parametrize("kind", FORMATS)
def test_dynamic_batch_builds_where_the_smallest_equals_the_number_of_heads(
    tmp_path: Path, kind: str
) -> None:
    config = TINY.model_copy(update={"hidden_size": 128, "num_heads": 1, "depth_single_blocks": 1})
    model = random_flux(config)
    save_mixed(
        model, tmp_path / "one_head.safetensors", dict.fromkeys(linears_in_plans(model), kind)
    )
    export_blocks(tmp_path / "one_head.safetensors", ignore_progress)
    spec = replace(SMALL_SPEC, profile=replace(SMALL_SPEC.profile, max_batch=2))
    manifest = build_engine(tmp_path, spec, ignore_progress)
    assert [entry.fp8_mha_found for entry in manifest.blocks] == [1, 1]
