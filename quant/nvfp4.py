"""NVFP4: E2M1 values in blocks of 16 with an E4M3 block scale and one fp32 global scale.

A value is ``code * block_scale * global_scale``. Packing is bit-exact with ModelOpt 0.47's
``NVFP4QuantExporter`` (tested against the installed ModelOpt), done in row chunks that stay in
cache: one weight of FLUX takes a tenth of the time and no fp32 copy of the whole tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import NotFiniteError, UnsupportedWeightError

NVFP4_BLOCK = 16
"""Elements along K that share a block scale (OCP/NVIDIA NVFP4)."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
"""Smallest positive E4M3 value; ModelOpt 0.47 clamps block scales to it."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude by the low three bits of a code; bit 3 is the sign."""

_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_ROWS_PER_CHUNK = 64
_SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class NVFP4Weight:
    """A quantized Linear weight ``[N, K]``.

    Attributes:
        packed: uint8 ``[N, K/2]``; the even element sits in the low nibble, as ONNX packs.
        block_scale: float8_e4m3fn ``[N, K/16]``, row-major.
        global_scale: fp32 scalar, ``amax / (6 * 448)``.
    """

    packed: Tensor
    block_scale: Tensor
    global_scale: Tensor

    def dequantize(self) -> Tensor:
        """Return the fp32 ``[N, K]`` weight that the codes stand for."""
        values = decode_e2m1(unpack_codes(self.packed)).unflatten(-1, (-1, NVFP4_BLOCK))
        scale = self.block_scale.float() * self.global_scale
        return (values * scale[..., None]).flatten(-2)


def encode_e2m1(x: Tensor) -> Tensor:
    """Round to the nearest E2M1 value, ties to the even code, saturating at 6.

    Args:
        x: fp32 of any shape.

    Returns:
        uint8 codes 0 to 15 of the same shape. A negative value that rounds to zero keeps its sign
        bit, minus zero does not, as in ModelOpt's ``NVFP4QTensor._cast_fp4``.
    """
    magnitude = x.abs()
    code = (x < 0).to(torch.uint8) << 3
    for index, midpoint in enumerate(_E2M1_MIDPOINTS):
        # the code above a midpoint is index + 1: at a tie it wins where it is the even one
        passed = magnitude >= midpoint if index % 2 else magnitude > midpoint
        code += passed.to(torch.uint8)
    return code


def decode_e2m1(codes: Tensor) -> Tensor:
    """Return the fp32 values of uint8 codes 0 to 15."""
    values = torch.tensor(E2M1_VALUES, device=codes.device)
    return torch.cat((values, -values))[codes.int()]


def pack_codes(codes: Tensor) -> Tensor:
    """Pack ``[..., K]`` codes two to a byte, even element in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """Undo ``pack_codes``."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def global_scale_from_amax(amax: Tensor) -> Tensor:
    """Return ``amax / (6 * 448)``, or 1 for an all-zero tensor, in fp32.

    ModelOpt 0.47 ``onnx/quantization/quant_utils.py::get_weights_scaling_factor_2``.
    """
    scale = amax.float() / (E2M1_MAX * E4M3_MAX)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def quantize_weight(weight: Tensor, linear: str) -> NVFP4Weight:
    """Quantize a Linear weight by its own amax.

    Args:
        weight: ``[N, K]``, bf16, fp16 or fp32, on any device.
        linear: Name for errors.

    Returns:
        The packed weight on the same device.

    Raises:
        UnsupportedWeightError: K is not a multiple of 16, or the dtype is none of the three.
        NotFiniteError: The weight holds NaN or infinity.
    """
    if weight.dtype not in _SOURCE_DTYPES:
        raise UnsupportedWeightError(
            linear, f"its weight is {weight.dtype}", "bf16, fp16 or fp32 is needed"
        )
    rows, columns = weight.shape
    if columns % NVFP4_BLOCK:
        raise UnsupportedWeightError(
            linear, f"it has {columns} inputs", f"a multiple of {NVFP4_BLOCK} is needed"
        )
    amax = weight.abs().amax().float()
    if not torch.isfinite(amax):
        raise NotFiniteError(f"The weight of '{linear}'", "The checkpoint is damaged; get it anew.")
    global_scale = global_scale_from_amax(amax)
    device = weight.device
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
    block_scale = torch.empty(
        rows, columns // NVFP4_BLOCK, dtype=torch.float8_e4m3fn, device=device
    )
    for start in range(0, rows, _ROWS_PER_CHUNK):
        chunk = slice(start, start + _ROWS_PER_CHUNK)
        blocks = weight[chunk].float().unflatten(-1, (-1, NVFP4_BLOCK))
        scale = _weight_block_scale(blocks, global_scale)
        scaled = blocks / (scale.float() * global_scale)[..., None]
        packed[chunk] = pack_codes(encode_e2m1(scaled).flatten(-2))
        block_scale[chunk] = scale
    return NVFP4Weight(packed, block_scale, global_scale)


def fake_quantize_activation(x: Tensor, global_scale: Tensor) -> Tensor:
    """Round ``x [..., K]`` as TensorRT's ``TRT_FP4DynamicQuantize`` and its two DQ nodes do.

    Args:
        x: Activations; computed in fp32, returned in their own dtype.
        global_scale: fp32 scalar from calibration. Blocks above ``6 * 448 * global_scale``
            saturate; a block whose scale underflows E4M3 becomes zero.

    Returns:
        The dequantized activations.
    """
    blocks = x.float().unflatten(-1, (-1, NVFP4_BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / (E2M1_MAX * global_scale)
    step = scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * global_scale
    scaled = torch.where(step > 0, blocks / step, torch.zeros_like(blocks))
    return (decode_e2m1(encode_e2m1(scaled)) * step).flatten(-2).to(x.dtype)


def _weight_block_scale(blocks: Tensor, global_scale: Tensor) -> Tensor:
    # amax / (6 * g) in this order: amax / 6 / g flips E4M3 ties against ModelOpt
    scale = blocks.abs().amax(-1) / (E2M1_MAX * global_scale)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
