"""Matrices of the reference, against a table of every code."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from flux_fp4.trt_runtime import reference_weights
from flux_fp4.trt_runtime.reference_weights import BlockMatrices, Scratch, StoredMatrix
from onnx import TensorProto

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def raw(name: str, data_type: int, shape: tuple[int, ...], values: torch.Tensor) -> TensorProto:
    data = values.contiguous().view(torch.uint8).numpy().tobytes()
    return onnx.helper.make_tensor(name, data_type, shape, data, raw=True)


def nvfp4(packed: torch.Tensor, block_scale: torch.Tensor, scale: float) -> StoredMatrix:
    rows, half = packed.shape
    return StoredMatrix.from_initializer(
        raw("w", TensorProto.FLOAT4E2M1, (rows, 2 * half), packed),
        raw("g", TensorProto.FLOAT, (), torch.tensor([scale])),
        raw("s", TensorProto.FLOAT8E4M3FN, tuple(block_scale.shape), block_scale),
    )


def dequantized(matrix: StoredMatrix) -> torch.Tensor:
    return torch.from_numpy(BlockMatrices({"w": matrix}, None).arrays()["w"])


def test_packed_fp4_is_read_low_nibble_first() -> None:
    every_pair = torch.arange(256, dtype=torch.uint8).view(1, 256)
    scales = torch.ones(1, 32).to(torch.float8_e4m3fn)
    table = torch.cat([E2M1, -E2M1])
    codes = torch.arange(256)
    expected = torch.stack([table[codes % 16], table[codes // 16]], dim=1).flatten()
    assert torch.equal(dequantized(nvfp4(every_pair, scales, 1.0))[0], expected)


def test_scales_of_blocks_and_of_the_matrix_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    # several pieces, the last one smaller
    monkeypatch.setattr(reference_weights, "CHUNK_VALUES", 3 * 32)
    random = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (7, 16), dtype=torch.uint8, generator=random)
    scales = (4 * torch.rand(7, 2, generator=random)).to(torch.float8_e4m3fn)
    table = torch.cat([E2M1, -E2M1])
    values = torch.stack([table[(packed & 15).long()], table[(packed >> 4).long()]], -1).flatten(1)
    expected = values * (scales.float() * 0.3).repeat_interleave(16, dim=1)
    assert torch.equal(dequantized(nvfp4(packed, scales, 0.3)), expected)


@pytest.mark.parametrize(
    ("onnx_type", "dtype"),
    [
        (TensorProto.FLOAT8E4M3FN, torch.float8_e4m3fn),
        (TensorProto.BFLOAT16, torch.bfloat16),
        (TensorProto.FLOAT16, torch.float16),
        (TensorProto.FLOAT, torch.float32),
    ],
)
def test_other_types_are_read_as_they_are(onnx_type: int, dtype: torch.dtype) -> None:
    values = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = StoredMatrix.from_initializer(raw("w", onnx_type, (5, 32), values))
    assert torch.equal(dequantized(plain), values.float())
    scale = raw("s", TensorProto.BFLOAT16, (), torch.tensor([0.5]).bfloat16())
    scaled = StoredMatrix.from_initializer(raw("w", onnx_type, (5, 32), values), scale)
    assert torch.equal(dequantized(scaled), values.float() * 0.5)


def test_scratch_serves_one_block_after_the_other() -> None:
    random = torch.Generator().manual_seed(0)
    scratch, scales = Scratch(), torch.ones(8, 2).to(torch.float8_e4m3fn)
    packed = torch.randint(0, 256, (8, 16), dtype=torch.uint8, generator=random)
    large = BlockMatrices(
        {"a": nvfp4(packed, scales, 1.0), "b": nvfp4(packed, scales, 2.0)}, scratch
    )
    small = BlockMatrices({"c": nvfp4(packed, scales, 3.0)}, scratch)
    first = {name: array.copy() for name, array in large.arrays().items()}
    (c,) = small.arrays().values()
    again = large.arrays()
    assert np.shares_memory(c, again["a"])
    np.testing.assert_array_equal(first["b"], 2 * first["a"])
    for name, array in again.items():
        np.testing.assert_array_equal(array, first[name])


def test_inference_mode_may_differ_between_runs() -> None:
    scales = torch.ones(1, 2).to(torch.float8_e4m3fn)
    packed = torch.full((1, 16), 0x22, dtype=torch.uint8)
    matrices = BlockMatrices({"w": nvfp4(packed, scales, 1.0)}, Scratch())
    for inference in (True, False):
        with torch.inference_mode(inference):
            assert (matrices.arrays()["w"] == 1).all()


@pytest.mark.parametrize(
    ("blocks", "scale", "problem"),
    [
        (None, torch.ones(1), "FP4 without block scales"),
        (torch.ones(5, 3), torch.ones(1), "with scales \\[5, 3\\]"),
        (torch.ones(5, 2), torch.ones(2), "2 scales"),
    ],
)
def test_scales_that_do_not_fit(
    blocks: torch.Tensor | None, scale: torch.Tensor, problem: str
) -> None:
    values = raw("w", TensorProto.FLOAT4E2M1, (5, 32), torch.zeros(5, 16, dtype=torch.uint8))
    block_scale = None
    if blocks is not None:
        fp8 = blocks.to(torch.float8_e4m3fn)
        block_scale = raw("s", TensorProto.FLOAT8E4M3FN, tuple(blocks.shape), fp8)
    with pytest.raises(ValueError, match=problem):
        StoredMatrix.from_initializer(
            values, raw("g", TensorProto.FLOAT, tuple(scale.shape), scale), block_scale
        )
