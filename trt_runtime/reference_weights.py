"""The matrices of a block for the reference: as stored, and as the fp32 that they stand for."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .resources import usable_cores

if TYPE_CHECKING:
    import onnx

NVFP4_BLOCK = 16
"""Values of a row that share a scale."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude by the low three bits of a code; bit 3 is the sign."""

CHUNK_VALUES = 1 << 19
"""Values that a thread dequantizes at once: 2 MB of fp32, near a core's second-level cache."""


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix ``[N, K]`` as the checkpoint stores it.

    Attributes:
        values: uint8 ``[N, K/2]``: E2M1 codes, the even one in the low nibble; otherwise ``[N, K]``
            in E4M3, bf16, fp16 or fp32.
        scale: fp32 scalar to multiply by, or None.
        block_scale: E4M3 ``[N, K/16]`` to multiply by as well, in FP4.
    """

    values: Tensor
    scale: Tensor | None = None
    block_scale: Tensor | None = None

    @classmethod
    def from_initializer(
        cls,
        values: onnx.TensorProto,
        scale: onnx.TensorProto | None = None,
        block_scale: onnx.TensorProto | None = None,
    ) -> StoredMatrix:
        """Copy a matrix out of a graph.

        Raises:
            ValueError: Type or shape of the values or their scales is not one of the above.
        """
        matrix = cls(
            _tensor(values),
            None if scale is None else _tensor(scale).float(),
            None if block_scale is None else _tensor(block_scale),
        )
        (rows, columns), blocks, name = matrix.shape, matrix.block_scale, values.name
        if matrix.values.dtype == torch.uint8 and blocks is None:
            raise ValueError(f"'{name}' is FP4 without block scales")
        if blocks is not None and blocks.shape != (rows, columns // NVFP4_BLOCK):
            raise ValueError(f"'{name}' is [{rows}, {columns}] with scales {list(blocks.shape)}")
        if matrix.scale is not None and matrix.scale.numel() != 1:
            raise ValueError(f"'{name}' has {matrix.scale.numel()} scales in place of one")
        return matrix

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        rows, columns = self.values.shape
        return rows, columns * (2 if self.values.dtype == torch.uint8 else 1)

    def chunks(self) -> Iterator[slice]:
        """Yield rows to dequantize at once."""
        rows, columns = self.shape
        step = max(1, CHUNK_VALUES // columns)
        return (slice(start, start + step) for start in range(0, rows, step))

    def dequantize(self, chunk: slice, out: Tensor) -> None:
        """Write some rows of fp32 ``[N, K]`` to ``out``."""
        scale = 1 if self.scale is None else self.scale
        if self.block_scale is None:
            torch.mul(self.values[chunk].float(), scale, out=out[chunk])
            return
        values = _decoded(self.values[chunk]).unflatten(-1, (-1, NVFP4_BLOCK))
        scales = self.block_scale[chunk].float() * scale
        target = out[chunk].unflatten(-1, (-1, NVFP4_BLOCK))
        torch.mul(values, scales[..., None], out=target)


class Scratch:
    """Room for the matrices of one block after the other, as large as the largest."""

    def __init__(self) -> None:
        self._room = np.empty(0, np.float32)

    def take(self, values: int) -> np.ndarray:
        """Return fp32 ``[values]``, the same memory every time."""
        if self._room.size < values:
            self.release()
            self._room = np.empty(values, np.float32)
        return self._room[:values]

    def release(self) -> None:
        """Free the room."""
        self._room = np.empty(0, np.float32)


class BlockMatrices:
    """What a block's session is fed besides tokens.

    Args:
        stored: By name of the input.
        scratch: Where to dequantize for every run. None: do it now and keep that; what is stored is
            forgotten.
    """

    def __init__(self, stored: Mapping[str, StoredMatrix], scratch: Scratch | None) -> None:
        self._stored, self._scratch = stored, scratch
        self._size = sum(math.prod(matrix.shape) for matrix in stored.values())
        self._kept: dict[str, np.ndarray] = {}
        if scratch is None:
            self._kept = _dequantized(stored, np.empty(self._size, np.float32))
            self._stored = {}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return fp32 ``[N, K]`` by name, valid until the scratch is taken by another block."""
        if self._scratch is None:
            return self._kept
        return _dequantized(self._stored, self._scratch.take(self._size))


def _dequantized(stored: Mapping[str, StoredMatrix], room: np.ndarray) -> dict[str, np.ndarray]:
    """Dequantize on all cores.

    torch's own threads would meet after each step on a piece, and wait there for cores that other
    processes have: measured on a busy machine, 25 s in place of 0.2 s.
    """
    arrays: dict[str, np.ndarray] = {}
    pieces, start = [], 0
    for name, matrix in stored.items():
        end = start + math.prod(matrix.shape)
        arrays[name] = room[start:end].reshape(matrix.shape)
        pieces += [(matrix, chunk, torch.from_numpy(arrays[name])) for chunk in matrix.chunks()]
        start = end

    def dequantize(piece: tuple[StoredMatrix, slice, Tensor]) -> None:
        matrix, chunk, out = piece
        with torch.inference_mode():
            matrix.dequantize(chunk, out)

    threads = min(usable_cores(), max(1, len(pieces)))
    # the number of torch's threads belongs to the thread that sets it
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(dequantize, pieces):
            pass
    return arrays


def _tensor(initializer: onnx.TensorProto) -> Tensor:
    """Copy an initializer; E2M1 stays packed as uint8 ``[N, K/2]``."""
    from onnx import TensorProto, numpy_helper

    types: dict[int, torch.dtype] = {
        TensorProto.FLOAT4E2M1: torch.uint8,
        TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
        TensorProto.BFLOAT16: torch.bfloat16,
        TensorProto.FLOAT16: torch.float16,
        TensorProto.FLOAT: torch.float32,
    }
    if initializer.data_type not in types:
        raise ValueError(f"'{initializer.name}' has ONNX type {initializer.data_type}")
    if not initializer.raw_data:
        return torch.from_numpy(numpy_helper.to_array(initializer).astype("float32"))
    values = torch.frombuffer(bytearray(initializer.raw_data), dtype=types[initializer.data_type])
    shape = list(initializer.dims)
    if values.dtype == torch.uint8:
        shape[-1] //= 2
    return values.view(shape)


def _decoded(packed: Tensor) -> Tensor:
    """Return fp32 ``[..., K]`` of packed codes ``[..., K/2]``."""
    # two values seen as one fp64: half the look-ups, and several times as fast as indexing
    values = torch.index_select(_pairs(), 0, packed.flatten().int()).view(torch.float32)
    return values.view(*packed.shape[:-1], 2 * packed.shape[-1])


@functools.cache
def _pairs() -> Tensor:
    # made outside of inference mode: what is kept may be used in both
    with torch.inference_mode(False):
        magnitudes = torch.tensor(E2M1_VALUES)
        values = torch.cat((magnitudes, -magnitudes))
        pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)
        return pairs.view(torch.float64).flatten()
