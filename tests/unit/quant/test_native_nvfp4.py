"""The native layout against comfy_kitchen, the library that ComfyUI reads it with."""

from __future__ import annotations

import json

import comfy_kitchen
import pytest
import torch
from comfy_kitchen.tensor import TensorCoreNVFP4Layout
from flux_fp4.quant.native_nvfp4 import (
    NativeNVFP4Weight,
    from_native,
    native_marker,
    native_shapes,
    to_native,
)
from flux_fp4.quant.nvfp4 import NVFP4Weight, quantize_weight

SIZES = [(128, 64), (256, 256), (1, 16), (5, 48), (16, 80), (130, 208), (300, 144), (3072, 64)]


def normal(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


def comfy_dequantize(native: NativeNVFP4Weight, rows: int) -> torch.Tensor:
    values = comfy_kitchen.dequantize_nvfp4(
        native.packed, native.global_scale, native.block_scale, torch.float32
    )
    return values[:rows]


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_comfy_kitchen_reads_the_same_values_from_a_converted_weight(
    rows: int, columns: int
) -> None:
    ours = quantize_weight(normal(rows, columns), "linear")
    assert torch.equal(comfy_dequantize(to_native(ours), rows), ours.dequantize())


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_weight_quantized_by_comfy_kitchen_converts_to_the_same_values(
    rows: int, columns: int
) -> None:
    qdata, params = TensorCoreNVFP4Layout.quantize(normal(rows, columns))
    native = NativeNVFP4Weight(qdata, params.block_scale, params.scale)
    ours = from_native(native, rows)
    assert ours.packed.shape == (rows, columns // 2)
    assert ours.block_scale.shape == (rows, columns // 16)
    assert torch.equal(ours.dequantize(), comfy_dequantize(native, rows))


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_comfy_kitchens_tensors_survive_the_round_trip_to_the_byte(rows: int, columns: int) -> None:
    qdata, params = TensorCoreNVFP4Layout.quantize(normal(rows, columns))
    native = NativeNVFP4Weight(qdata, params.block_scale, params.scale)
    again = to_native(from_native(native, rows))
    assert (tuple(qdata.shape), tuple(params.block_scale.shape)) == native_shapes(rows, columns)
    assert torch.equal(again.packed, qdata)
    assert torch.equal(again.block_scale.view(torch.uint8), params.block_scale.view(torch.uint8))
    assert torch.equal(again.global_scale, params.scale)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_our_tensors_survive_the_round_trip_to_the_byte(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = NVFP4Weight(
        torch.randint(256, (rows, columns // 2), generator=generator, dtype=torch.uint8),
        torch.randint(0, 127, (rows, columns // 16), generator=generator, dtype=torch.uint8).view(
            torch.float8_e4m3fn
        ),
        torch.tensor(0.25),
    )
    again = from_native(to_native(ours), rows)
    assert torch.equal(again.packed, ours.packed)
    assert torch.equal(again.block_scale.view(torch.uint8), ours.block_scale.view(torch.uint8))
    assert torch.equal(again.global_scale, ours.global_scale)


def test_older_files_store_block_scales_as_bytes() -> None:
    native = to_native(quantize_weight(normal(48, 64), "linear"))
    stored = NativeNVFP4Weight(
        native.packed, native.block_scale.view(torch.uint8), native.global_scale.reshape(1)
    )
    assert torch.equal(from_native(stored, 48).dequantize(), from_native(native, 48).dequantize())


@pytest.mark.parametrize("rows", [32, 49, 0])
def test_row_count_that_pads_to_another_shape_is_refused(rows: int) -> None:
    native = to_native(quantize_weight(normal(48, 64), "linear"))
    with pytest.raises(ValueError, match=r"weight has shape \[48, 32\]"):
        from_native(native, rows)


def test_block_scales_in_row_major_order_are_refused_by_shape() -> None:
    ours = quantize_weight(normal(48, 48), "linear")
    native = NativeNVFP4Weight(to_native(ours).packed, ours.block_scale, ours.global_scale)
    with pytest.raises(ValueError, match=r"weight_scale has shape \[48, 3\] instead of \[128, 4\]"):
        from_native(native, 48)


def test_marker_is_json_bytes() -> None:
    marker = native_marker("nvfp4")
    assert marker.dtype == torch.uint8
    assert json.loads(marker.numpy().tobytes()) == {"format": "nvfp4"}
