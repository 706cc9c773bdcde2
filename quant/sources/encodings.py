"""How a checkpoint stores a tensor: as it is, in FP8 or in NVFP4, and how to read it back.

A quantized tensor ``<layer>.weight`` has companions named after the layer. They are read with it
and never appear as tensors of the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors.sources import DamagedCheckpointError
from ..native_nvfp4 import NativeNVFP4Weight, from_native
from ..nvfp4 import NVFP4Weight
from .files import TensorReader

_ROWS_PER_CHUNK = 256

PLAIN_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Encoding(ABC):
    """A stored tensor.

    Attributes:
        checkpoint: File name for errors.
        name: Stored name.
        shape: Shape of what it stands for.
    """

    checkpoint: str
    name: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """What ``read`` returns: quantized tensors become bf16, FLUX's own precision."""
        return torch.bfloat16

    @abstractmethod
    def read(self, reader: TensorReader) -> Tensor:
        """Return the tensor in ``dtype``.

        Raises:
            DamagedCheckpointError: A scale is not finite.
        """

    def _finite(self, scale: Tensor, companion: str) -> Tensor:
        values = scale.float()
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            reason = f"its scale '{companion}' holds NaN, infinity or a negative value"
            raise DamagedCheckpointError(self.checkpoint, reason)
        return values


@dataclass(frozen=True)
class Plain(Encoding):
    """Stored in bf16, fp16 or fp32.

    Attributes:
        stored_dtype: One of the three.
    """

    stored_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The stored one."""
        return self.stored_dtype

    def read(self, reader: TensorReader) -> Tensor:
        """Return the tensor as it is stored."""
        return reader.tensor(self.name)


@dataclass(frozen=True)
class FP8(Encoding):
    """Stored in float8_e4m3fn or float8_e5m2, times a scale.

    Attributes:
        scale: Stored name of the fp32 scale, one value or ``[N, 1]``; None for plain FP8, which
            holds the weight itself.
    """

    scale: str | None

    def read(self, reader: TensorReader) -> Tensor:
        """Return the bf16 tensor; the product is rounded once, from fp32."""
        stored = reader.tensor(self.name)
        if self.scale is None:
            return stored.to(torch.bfloat16)
        scale = self._finite(reader.tensor(self.scale), self.scale).reshape(-1, 1)
        result = torch.empty(stored.shape, dtype=torch.bfloat16, device=stored.device)
        for start in range(0, stored.shape[0], _ROWS_PER_CHUNK):
            rows = slice(start, start + _ROWS_PER_CHUNK)
            factor = scale if scale.shape[0] == 1 else scale[rows]
            result[rows] = stored[rows].float() * factor
        return result


@dataclass(frozen=True)
class NVFP4(Encoding):
    """Stored in NVFP4 as ``weight``, ``weight_scale`` and ``weight_scale_2``.

    Attributes:
        native: Whether in ComfyUI's layout (high nibble first, scales in cuBLAS's order) rather
            than in ModelOpt's (low nibble first, scales row by row).
        pre_quant_scale: Stored name of the ``[K]`` factor of the input by which the weight was
            divided (AWQ), if there is one.
    """

    native: bool
    pre_quant_scale: str | None

    def packed(self, reader: TensorReader) -> NVFP4Weight:
        """Return codes and scales exactly, in our layout; without ``pre_quant_scale``."""
        layer = self.name.removesuffix(".weight")
        block_scale = reader.tensor(f"{layer}.weight_scale").view(torch.float8_e4m3fn)
        global_scale = reader.tensor(f"{layer}.weight_scale_2").float().reshape(())
        self._finite(block_scale, f"{layer}.weight_scale")
        self._finite(global_scale, f"{layer}.weight_scale_2")
        if not self.native:
            return NVFP4Weight(reader.tensor(self.name), block_scale, global_scale)
        native = NativeNVFP4Weight(reader.tensor(self.name), block_scale, global_scale)
        return from_native(native, self.shape[0])

    def read(self, reader: TensorReader) -> Tensor:
        """Return the bf16 weight that the codes stand for, in chunks of rows."""
        weight = self.packed(reader)
        factor: Tensor | float = 1.0
        if self.pre_quant_scale is not None:
            factor = self._finite(reader.tensor(self.pre_quant_scale), self.pre_quant_scale)
        result = torch.empty(self.shape, dtype=torch.bfloat16, device=weight.packed.device)
        for start in range(0, self.shape[0], _ROWS_PER_CHUNK):
            rows = slice(start, start + _ROWS_PER_CHUNK)
            chunk = NVFP4Weight(weight.packed[rows], weight.block_scale[rows], weight.global_scale)
            result[rows] = chunk.dequantize() * factor
        return result
