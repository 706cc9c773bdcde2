"""Reading a FLUX checkpoint tensor by tensor, after checking that it is one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UnknownCheckpointError, UnsupportedWeightError
from .flux.config import FluxConfig, config_from_shapes
from .flux.model import Flux
from .safetensors_header import read_header

_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
"""BFL's files have none; ComfyUI's saved checkpoints and all-in-one files have the others."""

_DTYPES = ("BF16", "F16", "F32")

_KEY_TENSOR = "double_blocks.0.img_attn.qkv.weight"

_FOREIGN = (
    (".lora_", "it is a LoRA"),
    ("lora_unet_", "it is a LoRA"),
    ("transformer_blocks.", "it is in diffusers layout, which is not supported yet"),
    ("encoder.block.", "it is a T5 text encoder"),
    ("text_model.", "it is a CLIP text encoder"),
    ("decoder.conv_in.", "it is a VAE"),
)


class SourceCheckpoint:
    """A FLUX.1 transformer on disk, tensors by BFL's names.

    Attributes:
        path: The safetensors file.
        config: Sizes read from the tensors' shapes.
        shapes: Shape by tensor name.
        dtypes: safetensors dtype code by tensor name (``BF16``, ``F16``, ``F32``, ...).
    """

    def __init__(self, path: Path) -> None:
        """Read the header of ``path`` and check every name and shape.

        Raises:
            UnknownCheckpointError: The file is no safetensors file or holds no FLUX.1 transformer.
            UnsupportedWeightError: A tensor is stored in a type that cannot be quantized.
        """
        self.path = path
        try:
            header = read_header(path)
        except SafetensorError as error:
            reason = f"it cannot be read as safetensors ({error})"
            raise UnknownCheckpointError(path.name, reason) from error
        self._prefix = _find_prefix(path.name, header.tensors)
        tensors = {
            name.removeprefix(self._prefix): place
            for name, place in header.tensors.items()
            if name.startswith(self._prefix)
        }
        self.shapes = {name: place.shape for name, place in tensors.items()}
        self.dtypes = {name: place.dtype for name, place in tensors.items()}
        self.config = _checked_config(path.name, self.shapes)
        for name, dtype in self.dtypes.items():
            if dtype not in _DTYPES:
                limit = f"{', '.join(_DTYPES)} can be quantized"
                raise UnsupportedWeightError(name.removesuffix(".weight"), f"it is {dtype}", limit)

    def tensors(self, names: Mapping[str, str], device: str) -> dict[str, Tensor]:
        """Load tensors.

        Args:
            names: Name in this checkpoint by the name to return it under.
            device: Where to put them.

        Returns:
            The tensors in their stored dtype.
        """
        with safe_open(self.path, framework="pt", device=device) as file:
            return {key: file.get_tensor(self._prefix + name) for key, name in names.items()}

    def submodule(self, prefix: str, device: str) -> dict[str, Tensor]:
        """Load the tensors whose name starts with ``prefix.``, under the rest of their names."""
        start = f"{prefix}."
        names = {name[len(start) :]: name for name in self.shapes if name.startswith(start)}
        return self.tensors(names, device)


def _find_prefix(name: str, header: Mapping[str, object]) -> str:
    for prefix in _PREFIXES:
        if prefix + _KEY_TENSOR in header:
            return prefix
    for marker, reason in _FOREIGN:
        if any(marker in tensor for tensor in header):
            raise UnknownCheckpointError(name, reason)
    raise UnknownCheckpointError(name, "it is another kind of model", (_KEY_TENSOR,))


def _checked_config(name: str, shapes: Mapping[str, tuple[int, ...]]) -> FluxConfig:
    try:
        config = config_from_shapes(shapes)
    except KeyError as error:
        raise UnknownCheckpointError(name, "it is incomplete", (str(error.args[0]),)) from error
    except ValueError as error:
        raise UnknownCheckpointError(name, str(error)) from error
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in Flux(config).state_dict().items()}
    missing = sorted(set(expected) - set(shapes))
    if missing:
        raise UnknownCheckpointError(name, "it is incomplete", missing)
    surplus = sorted(set(shapes) - set(expected))
    if surplus:
        reason = f"it holds {len(surplus)} tensors unknown to FLUX.1 (first: '{surplus[0]}')"
        raise UnknownCheckpointError(name, reason)
    wrong = next((key for key in sorted(expected) if expected[key] != shapes[key]), None)
    if wrong:
        reason = f"'{wrong}' has shape {list(shapes[wrong])}, not {list(expected[wrong])}"
        raise UnknownCheckpointError(name, reason)
    return config
