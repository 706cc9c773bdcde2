"""The reference executor: loading, unloading, and what it keeps in memory."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from flux_fp4.tests.unit.trt_runtime.block_inputs import block_inputs
from flux_fp4.trt_runtime import reference
from flux_fp4.trt_runtime.errors.blocks import BlocksMissingError
from flux_fp4.trt_runtime.errors.run import EngineNotLoadedError
from flux_fp4.trt_runtime.manifest import load_manifest
from flux_fp4.trt_runtime.reference import ReferenceExecutor, blocks_to_keep, fp32_bytes
from flux_fp4.trt_runtime.resources import Memory
from flux_fp4.trt_runtime.signature import read_block_folder
from safetensors.torch import load_file


def test_unload_frees_and_load_brings_back(built_folder: Path) -> None:
    executor = ReferenceExecutor(built_folder)
    assert not executor.loaded
    with pytest.raises(EngineNotLoadedError):
        executor.run("single_blocks.0", {})
    executor.load(torch.device("cpu"))
    assert executor.loaded
    executor.unload()
    assert not executor.loaded
    with pytest.raises(EngineNotLoadedError):
        executor.run("single_blocks.0", {})


def test_reference_needs_the_onnx_files(built_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BlocksMissingError):
        ReferenceExecutor(tmp_path)


def matrix_values(folder: Path, block: str) -> int:
    tensors = load_file(folder / "tiny.safetensors")
    packed = [t for name, t in tensors.items() if name.startswith(block) and t.dtype == torch.uint8]
    return sum(2 * tensor.numel() for tensor in packed)


def test_first_blocks_are_kept_in_fp32_within_a_limit(built_folder: Path) -> None:
    double, single = read_block_folder(built_folder)
    for signature in (double, single):
        values = matrix_values(built_folder, signature.block)
        # biases and norms are small
        assert 4 * values < fp32_bytes(signature) < 4.1 * values
    both = fp32_bytes(double) + fp32_bytes(single)
    assert blocks_to_keep((double, single), both) == {"double_blocks.0", "single_blocks.0"}
    assert blocks_to_keep((double, single), both - 1) == {"double_blocks.0"}
    # a smaller block behind one that does not fit is not kept: which ones are is easy to say
    assert blocks_to_keep((double, single), fp32_bytes(double) - 1) == set()


def test_weight_bytes_are_what_is_kept_what_is_stored_and_one_place(built_folder: Path) -> None:
    double, single = read_block_folder(built_folder)
    sizes = {
        limit: ReferenceExecutor(built_folder, limit).weight_bytes
        for limit in (0, fp32_bytes(double), 1 << 30)
    }
    assert list(sizes.values()) == [
        double.weight_bytes + single.weight_bytes + fp32_bytes(double),
        fp32_bytes(double) + single.weight_bytes + fp32_bytes(single),
        fp32_bytes(double) + fp32_bytes(single),
    ]


def test_limit_is_a_part_of_the_free_memory(
    built_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    double, single = read_block_folder(built_folder)
    for free in (4 * fp32_bytes(double) - 1, 4 * fp32_bytes(double)):
        monkeypatch.setattr(reference, "free_memory", lambda free=free: Memory(free, 1 << 40))
        limited = ReferenceExecutor(built_folder, free // 4).weight_bytes
        assert ReferenceExecutor(built_folder).weight_bytes == limited
    dequantized = double.weight_bytes + single.weight_bytes + fp32_bytes(double)
    assert limited != dequantized


def test_kept_and_dequantized_matrices_give_the_same_bits(built_folder: Path) -> None:
    results = []
    for limit in (0, 1 << 30):
        executor = ReferenceExecutor(built_folder, limit)
        executor.load(torch.device("cpu"))
        # in turns: what one block leaves behind is not for the other
        results.append(
            [
                executor.run(entry.block, block_inputs(entry, img_tokens=6, txt_tokens=3))
                for entry in 2 * load_manifest(built_folder / "sm120").blocks
            ]
        )
    for dequantized, kept in zip(*results, strict=True):
        for name, value in kept.items():
            assert torch.equal(dequantized[name], value)


def test_onnx_files_hold_no_weights(built_folder: Path) -> None:
    for path in built_folder.glob("*.onnx"):
        assert path.stat().st_size < 300_000
        onnx.checker.check_model(path, full_check=True)
        properties = {p.key: p.value for p in onnx.load(path).metadata_props}
        assert json.loads(properties["flux_fp4.fp4_linears"])
