"""The weights of a FLUX transformer, by BFL's tensor names, whatever the file calls them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors.sources import DamagedCheckpointError, UnknownCheckpointError
from ..flux.config import FluxConfig, config_from_shapes
from ..flux.model import tensor_shapes
from ..nvfp4 import NVFP4Weight
from .encodings import FP8, NVFP4, Encoding
from .files import CheckpointFiles, TensorReader, open_files
from .foreign import refuse_other_models
from .names import Fusion, Naming, bfl_naming, diffusers_naming, find_naming
from .stored_formats import StoredFormats, model_tensors

_MAX_BLOCKS = 256
"""FLUX.1 has 57 blocks, FLUX.2 dev 56. The limit keeps a made-up header from costing minutes."""

_SHARD = re.compile(r"(.+)-\d{5}-of-(?!00001)\d{5}\.safetensors")


class FluxSource(ABC):
    """A FLUX transformer to be quantized.

    Attributes:
        name: Shown to the user and stored in what is made from it: the file name.
        layout: ``bfl``, ``comfyui`` (BFL's names with a prefix), ``all-in-one``, ``diffusers``,
            ``diffusers-sharded``, ``fp8``, ``fp8-scaled``, ``comfyui-nvfp4``, ``modelopt-nvfp4``,
            or ``model`` for weights that are in memory.
        config: Sizes read from the tensors' shapes.
        size_bytes: Of the files.
        shapes: Shape by BFL's name, of the unquantized tensors.
    """

    name: str
    layout: str
    config: FluxConfig
    size_bytes: int
    shapes: Mapping[str, tuple[int, ...]]

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return in what ``tensors`` returns a tensor: bf16, fp16 or fp32."""

    @abstractmethod
    def tensors(self, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
        """Load tensors in high precision.

        Args:
            names: BFL's names.
            device: Where to put them.

        Returns:
            The tensors by name: dequantized, fused and in BFL's order. To be read only.

        Raises:
            DamagedCheckpointError: A file cannot be read, or a scale is not finite.
        """

    @abstractmethod
    def packed(self, linear: str, device: str = "cpu") -> NVFP4Weight | None:
        """Load the weight of a Linear as stored, if it is stored in NVFP4.

        Args:
            linear: For example ``double_blocks.0.img_attn.qkv``.
            device: Where to put it.

        Returns:
            Exactly the stored codes and scales, or None if one ``NVFP4Weight`` cannot hold them:
            another format, parts with different global scales, or a factor of the input.

        Raises:
            DamagedCheckpointError: As ``tensors``.
        """

    @abstractmethod
    def digest(self) -> str:
        """Return a blake3 digest that changes with any training or merge, without reading all."""

    def read_ahead(self, prefix: str, stopping: Callable[[], bool]) -> None:  # noqa: B027
        """Bring what is stored under ``prefix.`` into the system's file cache, if it is in a file.

        Args:
            prefix: For example ``double_blocks.1``.
            stopping: Asked now and then; True ends the reading early.

        Raises:
            DamagedCheckpointError: As ``tensors``.
        """

    def submodule(self, prefix: str, device: str = "cpu") -> dict[str, Tensor]:
        """Load the tensors whose name starts with ``prefix.``, under the rest of their names."""
        start = f"{prefix}."
        names = [name for name in self.shapes if name.startswith(start)]
        loaded = self.tensors(names, device)
        return {name.removeprefix(start): tensor for name, tensor in loaded.items()}


class FileSource(FluxSource):
    """A FLUX transformer in a safetensors file, or in shards."""

    def __init__(
        self,
        files: CheckpointFiles,
        layout: str,
        fusions: Mapping[str, Fusion],
        encodings: Mapping[str, Encoding],
    ) -> None:
        """Put BFL's tensors together; ``open_source`` finds out what they are made of.

        Args:
            files: The files.
            layout: See ``FluxSource``.
            fusions: By BFL's name.
            encodings: By stored name.

        Raises:
            UnknownCheckpointError: Names or shapes are not those of a FLUX transformer.
            DamagedCheckpointError: Parts of a tensor do not fit together.
        """
        self.name, self.layout, self.size_bytes = files.path.name, layout, files.size_bytes
        self._files = files
        self._fusions = dict(fusions)
        self._encodings = dict(encodings)
        self.shapes = {name: self._fused_shape(name) for name in self._fusions}
        self.config = checked_config(self.name, self.shapes)

    def dtype(self, name: str) -> torch.dtype:
        """See ``FluxSource``."""
        first, *rest = (part.dtype for part in self._parts(name))
        for other in rest:
            first = torch.promote_types(first, other)
        return first

    def tensors(self, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
        """See ``FluxSource``."""
        with self._files.reader(device) as reader:
            return {name: self._fused(name, reader, device) for name in names}

    def read_ahead(self, prefix: str, stopping: Callable[[], bool]) -> None:
        """See ``FluxSource``."""
        names = (name for name in self._fusions if name.startswith(f"{prefix}."))
        self._files.read_ahead([p for name in names for p in self._fusions[name].parts], stopping)

    def packed(self, linear: str, device: str = "cpu") -> NVFP4Weight | None:
        """See ``FluxSource``."""
        parts = self._parts(f"{linear}.weight")
        if self._fusions[f"{linear}.weight"].swap_halves:
            return None
        stored = []
        with self._files.reader(device) as reader:
            for part in parts:
                if not isinstance(part, NVFP4) or part.pre_quant_scale is not None:
                    return None
                stored.append(part.packed(reader))
        first = stored[0]
        if len(stored) == 1:
            return first
        if any(not torch.equal(part.global_scale, first.global_scale) for part in stored):
            return None
        # torch has no cat for float8
        block_scale = torch.cat([part.block_scale.view(torch.uint8) for part in stored])
        return NVFP4Weight(
            torch.cat([part.packed for part in stored]),
            block_scale.view(torch.float8_e4m3fn),
            first.global_scale,
        )

    def digest(self) -> str:
        """See ``FluxSource``; reads the headers and the first 4 KiB of every tensor."""
        return self._files.digest()

    def _parts(self, name: str) -> list[Encoding]:
        return [self._encodings[part] for part in self._fusions[name].parts]

    def _fused_shape(self, name: str) -> tuple[int, ...]:
        first, *rest = (part.shape for part in self._parts(name))
        if not all(first):
            raise DamagedCheckpointError(self.name, f"'{name}' has the empty shape {list(first)}")
        # q, k and v have the same rows; the MLP that linear1 has below them has others
        for index, shape in enumerate(rest, start=1):
            if shape[1:] != first[1:] or (index < 3 and shape != first):
                names = self._fusions[name].parts
                reason = (
                    f"'{names[0]}' of shape {list(first)} and '{names[index]}' of shape "
                    f"{list(shape)} do not fit together"
                )
                raise DamagedCheckpointError(self.name, reason)
        return (sum(shape[0] for shape in (first, *rest)), *first[1:]) if first else ()

    def _fused(self, name: str, reader: TensorReader, device: str) -> Tensor:
        parts, fusion = self._parts(name), self._fusions[name]
        if fusion.swap_halves:
            upper, lower = parts[0].read(reader).chunk(2)
            return torch.cat((lower, upper))
        if len(parts) == 1:
            return parts[0].read(reader)
        result = torch.empty(self.shapes[name], dtype=self.dtype(name), device=device)
        rows = 0
        for part in parts:
            result[rows : rows + part.shape[0]] = part.read(reader)
            rows += part.shape[0]
        return result


def open_source(path: Path) -> FluxSource:
    """Open a FLUX checkpoint; no tensor is loaded.

    Args:
        path: A safetensors file in BFL's, ComfyUI's or diffusers' layout, an all-in-one checkpoint,
            or the ``.safetensors.index.json`` of a sharded one.

    Raises:
        UnknownCheckpointError: It is no FLUX transformer that can be read.
        DamagedCheckpointError: A file is damaged, or something in it is missing or contradicts.
        UnsupportedWeightError: A tensor is stored in a format that cannot be read.
    """
    files = open_files(path)
    _refuse_quantized(files)
    _refuse_single_shard(files)
    found = find_naming(files.stored)
    if found is None:
        refuse_other_models(files.stored, path.name)
        raise UnknownCheckpointError(path.name, "it holds no FLUX transformer")
    prefix, is_diffusers = found
    names = model_tensors(files.stored, prefix)
    refuse_other_models((name.removeprefix(prefix) for name in names), path.name)
    naming = diffusers_naming(names, prefix) if is_diffusers else bfl_naming(names, prefix)
    _check_naming(path.name, naming)
    formats = StoredFormats(files, prefix)
    encodings = {name: formats.encoding(name) for name in names}
    layout = _layout(files, prefix, is_diffusers, encodings)
    return FileSource(files, layout, naming.fusions, encodings)


def _layout(
    files: CheckpointFiles, prefix: str, is_diffusers: bool, encodings: Mapping[str, Encoding]
) -> str:
    natives = {part.native for part in encodings.values() if isinstance(part, NVFP4)}
    scaled = {part.scale is not None for part in encodings.values() if isinstance(part, FP8)}
    if natives:
        return "comfyui-nvfp4" if True in natives else "modelopt-nvfp4"
    if scaled:
        return "fp8-scaled" if True in scaled else "fp8"
    if is_diffusers:
        return "diffusers-sharded" if files.sharded else "diffusers"
    if not all(name.startswith(prefix) for name in files.stored):
        return "all-in-one"
    return "comfyui" if prefix else "bfl"


def _refuse_quantized(files: CheckpointFiles) -> None:
    if any("flux_fp4" in metadata for metadata in files.metadata):
        raise UnknownCheckpointError(
            files.path.name,
            "this pack has already quantized it",
            next_step="Choose it in 'Export FLUX FP4 to ONNX' or 'Build TensorRT Engine'.",
        )


def _refuse_single_shard(files: CheckpointFiles) -> None:
    if shard := _SHARD.fullmatch(files.path.name):
        raise UnknownCheckpointError(
            files.path.name,
            "it is one shard of several",
            next_step=f"Choose '{shard[1]}.safetensors.index.json'.",
        )


def _check_naming(name: str, naming: Naming) -> None:
    if naming.missing:
        raise UnknownCheckpointError(name, "it is incomplete", naming.missing)
    if naming.surplus:
        _refuse_surplus(name, naming.surplus)


def _refuse_surplus(name: str, surplus: Iterable[str]) -> None:
    names = sorted(surplus)
    first = ", ".join(f"'{tensor}'" for tensor in names[:3])
    reason = f"it holds {len(names)} tensors unknown to FLUX (first: {first})"
    raise UnknownCheckpointError(name, reason)


def checked_config(name: str, shapes: Mapping[str, tuple[int, ...]]) -> FluxConfig:
    """Read the configuration off tensor shapes and require exactly its tensors.

    Args:
        name: Of the checkpoint, for errors.
        shapes: Shape by BFL's name.

    Raises:
        UnknownCheckpointError: Names or shapes are not those of a FLUX transformer.
    """
    try:
        config = config_from_shapes(shapes)
    except KeyError as error:
        raise UnknownCheckpointError(name, "it is incomplete", (str(error.args[0]),)) from error
    except (ValueError, IndexError) as error:
        raise UnknownCheckpointError(name, str(error)[:500]) from error
    if len(config.block_names) > _MAX_BLOCKS:
        reason = f"it has {len(config.block_names)} blocks, the limit is {_MAX_BLOCKS}"
        raise UnknownCheckpointError(name, reason)
    expected = tensor_shapes(config)
    missing = sorted(set(expected) - set(shapes))
    if missing:
        raise UnknownCheckpointError(name, "it is incomplete", missing)
    if surplus := set(shapes) - set(expected):
        _refuse_surplus(name, surplus)
    wrong = next((key for key in sorted(expected) if expected[key] != shapes[key]), None)
    if wrong is not None:
        reason = f"'{wrong}' has shape {list(shapes[wrong])}, not {list(expected[wrong])}"
        raise UnknownCheckpointError(name, reason)
    return config
