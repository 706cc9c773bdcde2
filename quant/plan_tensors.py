"""What the tensors of plans look like in a quantized checkpoint: checked before graphs use them.

A quantized checkpoint may come from anybody. What it says of itself is believed only as far as its
tensors have the types and shapes that follow from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from .flux.config import FluxConfig, block_linears, plan_shapes
from .recipe import Format
from .safetensors_header import StoredTensor

Expected = tuple[str, str, tuple[int, ...]]
"""Name, safetensors dtype code and shape."""

_NVFP4_BLOCK = 16
"""As ``nvfp4_scales.NVFP4_BLOCK``, which lies beside code that imports torch."""

_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""dtype codes of the types that a plan computes in."""

_FORMATS: dict[str, Format] = {"U8": "nvfp4", "F8_E4M3": "fp8"}


def stored_format(weight: StoredTensor) -> Format:
    """Tell a block Linear's format from its stored weight."""
    return _FORMATS.get(weight.dtype, "bf16")


def plan_tensor_fault(
    tensors: Mapping[str, StoredTensor],
    config: FluxConfig,
    blocks: Iterable[str],
    high_precision: str,
    fp8_attention: bool,
) -> str | None:
    """Say which tensor is not what quantization writes, or None if all are.

    Args:
        tensors: Place of every tensor by name; every Linear has its weight.
        config: Of the transformer.
        blocks: Those that the file holds, for example ``double_blocks.0``.
        high_precision: ``bf16``, ``fp16`` or ``fp32``.
        fp8_attention: Whether q, k and v have scales.
    """
    dtype = _DTYPES[high_precision]
    for block in blocks:
        for name, wanted, shape in _expected(tensors, config, block, dtype, fp8_attention):
            place = tensors.get(name)
            if place is None:
                return f"it lacks '{name}'"
            if (place.dtype, place.shape) != (wanted, shape):
                found = f"{place.dtype} {list(place.shape)}"
                return f"'{name}' is {found}, not {wanted} {list(shape)}"
    return None


def _expected(
    tensors: Mapping[str, StoredTensor],
    config: FluxConfig,
    block: str,
    dtype: str,
    fp8_attention: bool,
) -> Iterator[Expected]:
    linears = {f"{linear}.weight" for linear in block_linears(block)}
    for part, shape in plan_shapes(config, block).items():
        name = f"{block}.{part}"
        if part in linears:
            yield from _linear(tensors, name.removesuffix(".weight"), shape[0], shape[1], dtype)
        else:
            yield name, dtype, shape
    if fp8_attention:
        yield from ((f"{block}.attention.{part}_scale", dtype, ()) for part in ("q", "k", "v"))


def _linear(
    tensors: Mapping[str, StoredTensor], linear: str, rows: int, columns: int, dtype: str
) -> Iterator[Expected]:
    stored = stored_format(tensors[f"{linear}.weight"])
    if stored == "bf16":
        yield f"{linear}.weight", dtype, (rows, columns)
    else:
        yield f"{linear}.input_scale", "F32", ()
    if stored == "fp8":
        yield f"{linear}.weight", "F8_E4M3", (rows, columns)
        yield f"{linear}.weight_scale", "F32", (rows,)
    if stored == "nvfp4":
        yield f"{linear}.weight", "U8", (rows, columns // 2)
        yield f"{linear}.weight_scale", "F8_E4M3", (rows, columns // _NVFP4_BLOCK)
        yield f"{linear}.weight_scale_2", "F32", ()
    if f"{linear}.pre_quant_scale" in tensors:
        yield f"{linear}.pre_quant_scale", dtype, (columns,)
    branch = [tensors[n] for n in (f"{linear}.svd_down", f"{linear}.svd_up") if n in tensors]
    if branch:
        rank = branch[0].shape[0] if branch[0].shape else 0
        yield f"{linear}.svd_down", dtype, (rank, columns)
        yield f"{linear}.svd_up", dtype, (rows, rank)
