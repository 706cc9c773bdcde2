"""A quantized checkpoint in ComfyUI's own NVFP4 form, for its 'Load Diffusion Model'.

ComfyUI 0.30 (``ops.py::mixed_precision_ops``) takes a Linear as NVFP4 where its ``comfy_quant``
says so: ``weight``, ``weight_scale`` and ``weight_scale_2`` in the layout of ``native_nvfp4``, and
``input_scale``, by which it quantizes the input on GPUs with FP4. Everything else is copied.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from blake3 import blake3
from safetensors import SafetensorError
from torch import Tensor

from .errors.export import NativeCheckpointError, NativeTargetError
from .errors.files import DiskFullError
from .flux.config import block_linears
from .native_nvfp4 import native_marker, native_shapes, to_native
from .nvfp4 import NVFP4Weight
from .progress import Progress
from .quantized_checkpoint import QuantizedCheckpoint
from .safetensors_header import StoredTensor, read_header
from .whole_files import make_folder, only_writer, whole_file

ORIGIN_KEY = "flux_fp4_native"
"""Metadata entry of the files written here: content digest of the quantized checkpoint."""

_ATTENTION_SCALES = (".attention.q_scale", ".attention.k_scale", ".attention.v_scale")
"""Of FP8 attention in plans; ComfyUI's attention stays in high precision."""

_ELEMENT_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1}
"""Of every dtype that a quantized checkpoint holds."""

_COPY_BYTES = 16 * 2**20
_ALIGNMENT = 8
"""safetensors aligns the end of its header to 8 bytes."""


def save_native_checkpoint(
    checkpoint: QuantizedCheckpoint, destination: Path, progress: Progress
) -> None:
    """Write a quantized checkpoint for ComfyUI's own loader, with one Linear in memory at a time.

    Args:
        checkpoint: Its block Linears are NVFP4 or high precision.
        destination: The ``.safetensors`` file. It takes its name when it is complete; a file there
            is kept if it is up to date, and replaced if it was written here.
        progress: Called before each Linear; raises to cancel, which leaves nothing behind.

    Raises:
        NativeCheckpointError: A Linear is in a form that ComfyUI does not know.
        NativeTargetError: ``destination`` is a file that was not written here.
        DiskFullError: The disk cannot hold the file.
        FileWriteError: The system refuses to write.
    """
    linears = _nvfp4_linears(checkpoint)
    digest = checkpoint.metadata.content_digest
    if _origin(destination) == digest:
        return
    layout = _layout(checkpoint, linears)
    header = _header(layout, {"format": "pt", ORIGIN_KEY: digest})
    size = len(header) + sum(place.length for place in layout.values())
    copied = [name for name in layout if not _is_converted(name, linears)]
    waiting = partial(progress, "Waiting for another process that writes this file", 0, 1)
    with _native_file(destination, size, waiting) as file:
        file.write(header)
        for done, linear in enumerate(linears):
            progress(f"Converting {linear}", done, len(linears))
            for name, tensor in _converted(checkpoint, linear).items():
                file.seek(len(header) + layout[name].offset)
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        with checkpoint.path.open("rb") as source:
            for name in copied:
                progress("Copying what is not NVFP4", len(linears), len(linears))
                file.seek(len(header) + layout[name].offset)
                _copy(source, checkpoint.tensors[name], file)


def _nvfp4_linears(checkpoint: QuantizedCheckpoint) -> tuple[str, ...]:
    found = []
    for block in checkpoint.metadata.config.block_names:
        for linear in (f"{block}.{part}" for part in block_linears(block)):
            if checkpoint.linear_format(linear) == "fp8":
                reason = "is FP8 with a scale per row, and ComfyUI has one scale for all of them"
                raise NativeCheckpointError(checkpoint.name, linear, reason)
            if f"{linear}.svd_down" in checkpoint.tensors:
                reason = "has a low-rank branch (SVDQuant), which ComfyUI does not compute"
                raise NativeCheckpointError(checkpoint.name, linear, reason)
            if f"{linear}.pre_quant_scale" in checkpoint.tensors:
                reason = "scales its inputs (AWQ), and ComfyUI adds LoRAs as if it did not"
                raise NativeCheckpointError(checkpoint.name, linear, reason)
            if checkpoint.linear_format(linear) == "nvfp4":
                found.append(linear)
    return tuple(found)


def _layout(checkpoint: QuantizedCheckpoint, linears: Sequence[str]) -> dict[str, StoredTensor]:
    """Return every tensor of the native file; offsets count from the end of its header."""
    stored = {
        name: place
        for name, place in checkpoint.tensors.items()
        if not name.endswith(_ATTENTION_SCALES)
    }
    marker = len(native_marker("nvfp4"))
    for linear in linears:
        rows, half_columns = stored[f"{linear}.weight"].shape
        packed, scales = native_shapes(rows, 2 * half_columns)
        stored[f"{linear}.weight"] = _bytes_tensor("U8", packed)
        stored[f"{linear}.weight_scale"] = _bytes_tensor("F8_E4M3", scales)
        stored[f"{linear}.comfy_quant"] = _bytes_tensor("U8", (marker,))
    # widest elements first: every tensor starts at a multiple of its element size
    order = sorted(stored, key=lambda name: (-_ELEMENT_BYTES[stored[name].dtype], name))
    layout, end = {}, 0
    for name in order:
        place = stored[name]
        layout[name] = StoredTensor(place.dtype, place.shape, end, place.length)
        end += place.length
    return layout


def _bytes_tensor(dtype: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(dtype, shape, 0, torch.Size(shape).numel())


def _is_converted(name: str, linears: Collection[str]) -> bool:
    linear, _, part = name.rpartition(".")
    return linear in linears and part in ("weight", "weight_scale", "comfy_quant")


def _converted(checkpoint: QuantizedCheckpoint, linear: str) -> dict[str, Tensor]:
    weight = NVFP4Weight(
        checkpoint.load(f"{linear}.weight"),
        checkpoint.load(f"{linear}.weight_scale"),
        checkpoint.load(f"{linear}.weight_scale_2"),
    )
    native = to_native(weight)
    return {
        f"{linear}.weight": native.packed,
        f"{linear}.weight_scale": native.block_scale,
        f"{linear}.comfy_quant": native_marker("nvfp4"),
    }


def _header(layout: dict[str, StoredTensor], metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata}
    for name, place in layout.items():
        entries[name] = {
            "dtype": place.dtype,
            "shape": list(place.shape),
            "data_offsets": [place.offset, place.offset + place.length],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(len(text) + -len(text) % _ALIGNMENT, b" ")
    return struct.pack("<Q", len(text)) + text


def _copy(source: BinaryIO, place: StoredTensor, file: BinaryIO) -> None:
    source.seek(place.offset)
    left = place.length
    while left:
        block = source.read(min(left, _COPY_BYTES))
        file.write(block)
        left -= len(block)


def _origin(destination: Path) -> str | None:
    """Return the digest that a file written here carries, None if there is no file.

    Raises:
        NativeTargetError: There is a file, and it was not written here.
    """
    if not destination.exists():
        return None
    try:
        origin = read_header(destination).metadata.get(ORIGIN_KEY)
    except (SafetensorError, OSError):
        origin = None
    if origin is None:
        raise NativeTargetError(destination.name)
    return origin


@contextlib.contextmanager
def _native_file(destination: Path, size: int, waiting: Callable[[], None]) -> Iterator[BinaryIO]:
    make_folder(destination.parent)
    # ComfyUI's own model folder gets no lock file
    key = blake3(str(destination.resolve()).encode()).hexdigest(16)
    lock = Path(tempfile.gettempdir()) / f"flux_fp4-{key}.lock"
    with only_writer(lock, destination.parent, re.escape(destination.stem), waiting):
        free = shutil.disk_usage(destination.parent).free
        if free < size:
            raise DiskFullError(destination.name, size, free)
        with whole_file(destination, size) as file:
            yield file
