from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from flux_fp4.quant.e2m1 import (
    E2M1_VALUES,
    decode_e2m1,
    decode_packed,
    encode_e2m1,
    pack_codes,
    round_to_e2m1,
    unpack_codes,
)
from onnx import TensorProto


def around_every_rounding_edge() -> torch.Tensor:
    """Values, midpoints between them, their fp32 neighbours, and extremes, of both signs."""
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    exact = torch.cat((torch.tensor(E2M1_VALUES), midpoints, torch.tensor([6.5, 7.0, 9.0])))
    below, above = (torch.nextafter(exact, torch.tensor(end)) for end in (0.0, torch.inf))
    extremes = torch.tensor([1e-45, 1e-30, 1e30, torch.inf])
    values = torch.cat((exact, below, above, extremes))
    return torch.cat((values, -values))


def test_encoding_equals_modelopts_at_every_rounding_edge() -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    values = around_every_rounding_edge()
    assert torch.equal(encode_e2m1(values), NVFP4QTensor._cast_fp4(values.clone()))


def test_rounding_equals_encoding_and_decoding() -> None:
    values = around_every_rounding_edge()
    decoded = decode_e2m1(encode_e2m1(values))
    assert torch.equal(round_to_e2m1(values.abs()), decoded.abs())


def test_all_sixteen_codes_survive_decode_and_encode() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = decode_e2m1(codes)
    assert values.tolist() == [*E2M1_VALUES, *(-value for value in E2M1_VALUES)]
    # minus zero has no sign of its own in ModelOpt's encoder
    expected = torch.where(codes == 8, 0, codes)
    assert torch.equal(encode_e2m1(values), expected)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)],
)
def test_ties_go_to_the_even_code(value: float, rounded: float) -> None:
    for sign in (1, -1):
        code = encode_e2m1(torch.tensor([sign * value]))
        assert decode_e2m1(code).item() == sign * rounded


def test_values_beyond_six_saturate() -> None:
    assert decode_e2m1(encode_e2m1(torch.tensor([6.1, -1e9]))).tolist() == [6.0, -6.0]


def test_even_element_sits_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    packed = pack_codes(codes)
    assert packed.tolist() == [[0x21, 0x0F]]
    assert torch.equal(unpack_codes(packed), codes)


def test_packing_is_onnxs_own_order() -> None:
    codes = torch.arange(16, dtype=torch.uint8)[None]
    tensor = TensorProto(
        data_type=TensorProto.FLOAT4E2M1, dims=[1, 16], raw_data=pack_codes(codes).numpy().tobytes()
    )
    decoded = onnx.numpy_helper.to_array(tensor).astype(np.float32)
    assert decoded.tolist() == decode_e2m1(codes).tolist()


def test_every_byte_decodes_to_its_two_values() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    assert torch.equal(decode_packed(packed), decode_e2m1(unpack_codes(packed)))


def test_strided_codes_pack_like_contiguous_ones() -> None:
    codes = torch.randint(16, (32, 8), generator=torch.Generator().manual_seed(0)).byte()
    assert torch.equal(pack_codes(codes.T), pack_codes(codes.T.contiguous()))
