from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from flux_fp4.tests.unit.trt_runtime.block_graph import DOUBLE_LINEARS, byte_ranges, write_blocks
from flux_fp4.trt_runtime.errors.blocks import BlocksMissingError, BlocksMixedError
from flux_fp4.trt_runtime.signature import read_block_folder, read_signature


def test_signature_of_a_double_block(built_folder: Path) -> None:
    signature = read_signature(built_folder / "double_blocks.0.onnx")
    assert (signature.block, signature.kind) == ("double_blocks.0", "double")
    assert set(signature.fp4_linears) == set(DOUBLE_LINEARS)
    assert signature.fp8_linears == ()
    assert signature.fp8_attention
    specs = {spec.name: spec for spec in signature.inputs}
    assert specs["img"].shape == ("B", "N", 128)
    assert specs["txt_mod2_gate"].shape == ("B", 1, 128)
    assert (specs["cos"].dtype, specs["cos"].shape) == ("fp32", ("B", "S", 32))
    assert {spec.name: spec.dtype for spec in signature.outputs} == {
        "img_out": "bf16",
        "txt_out": "bf16",
    }


def test_linears_are_listed_by_format(blocks: Callable[..., Path]) -> None:
    signature = read_signature(blocks(depth=0, fp8=("linear1",)) / "single_blocks.0.onnx")
    assert (signature.fp4_linears, signature.fp8_linears) == (("linear2",), ("linear1",))


def test_ranges_are_those_of_the_safetensors_file(built_folder: Path) -> None:
    signature = read_signature(built_folder / "single_blocks.0.onnx")
    stored = byte_ranges(built_folder / "tiny.safetensors")
    assert signature.weights == built_folder / "tiny.safetensors"
    assert {r.name: (r.offset, r.length) for r in signature.ranges} == {
        name.removeprefix("single_blocks.0."): place
        for name, place in stored.items()
        if name.startswith("single_blocks.0.")
    }


def test_folder_lists_blocks_in_running_order(blocks: Callable[..., Path]) -> None:
    folder = blocks(depth=2, depth_single=11, hidden=64)
    names = [signature.block for signature in read_block_folder(folder)]
    assert names[:3] == ["double_blocks.0", "double_blocks.1", "single_blocks.0"]
    assert names[-1] == "single_blocks.10"


def test_folder_without_a_block_is_refused(blocks: Callable[..., Path]) -> None:
    folder = blocks(depth=2, hidden=64)
    (folder / "double_blocks.1.onnx").unlink()
    with pytest.raises(BlocksMissingError) as caught:
        read_block_folder(folder)
    assert caught.value.missing == ("double_blocks.1",)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BlocksMissingError):
        read_block_folder(tmp_path)


def test_block_beyond_the_model_is_refused(blocks: Callable[..., Path], tmp_path: Path) -> None:
    folder = blocks(depth=1, hidden=64)
    longer = write_blocks(tmp_path / "longer", depth=2, hidden=64)
    for name in ("double_blocks.1.onnx", "tiny.safetensors"):
        (longer / name).replace(folder / name)
    with pytest.raises(BlocksMixedError, match=r"double_blocks\.1\.onnx"):
        read_block_folder(folder)


def test_blocks_of_two_checkpoints_are_refused(blocks: Callable[..., Path], tmp_path: Path) -> None:
    folder = blocks(hidden=64)
    other = write_blocks(tmp_path / "other", hidden=64, checkpoint_digest="decaf")
    (other / "single_blocks.0.onnx").replace(folder / "single_blocks.0.onnx")
    with pytest.raises(BlocksMixedError, match="checkpoint_digest"):
        read_block_folder(folder)
