"""A MODEL as source of weights: as it would be sampled, LoRAs merged, one block at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import comfy.lora
import torch
from blake3 import blake3
from torch import Tensor

from ..quant.flux.config import FluxConfig
from ..quant.nvfp4 import NVFP4Weight
from ..quant.sources.source import FluxSource, checked_config
from .errors import ModelSourceError
from .patch_digest import update_digest

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_PREFIX = "diffusion_model."
_SAMPLE_BYTES = 4096


class ModelSource(FluxSource):
    """The transformer inside a MODEL, tensors by BFL's names."""

    layout = "model"

    def __init__(self, model: ModelPatcher) -> None:
        """Look at the MODEL's weights and patches; nothing is computed or moved.

        Raises:
            ModelSourceError: It is not a plain FLUX: another model, an engine, or one with patches
                that do not end up in its weights.
            UnknownCheckpointError: Its tensors are not FLUX's.
        """
        _check_weights_tell_all(model)
        plain = model.clone(disable_dynamic=True)
        # each entry: the weight without patches and its conversion, then the patches
        self._patches = {
            _bfl_name(key): (key, entries)
            for key, entries in plain.get_key_patches(_PREFIX).items()
        }
        self._model = plain  # keeps the weights alive
        self.shapes = {name: tuple(_weight(e).shape) for name, (_, e) in self._patches.items()}
        self.config: FluxConfig = checked_config("MODEL", self.shapes)
        self.name = "MODEL"
        self.size_bytes = sum(
            _weight(entries).numel() * _weight(entries).element_size()
            for _, entries in self._patches.values()
        )

    def dtype(self, name: str) -> torch.dtype:
        _, entries = self._patches[name]
        if len(entries) > 1:
            return torch.float32
        dtype = _weight(entries).dtype
        return dtype if dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.bfloat16

    def tensors(self, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
        return {name: self._tensor(name, device) for name in names}

    def packed(self, linear: str, device: str = "cpu") -> NVFP4Weight | None:
        return None

    def digest(self) -> str:
        digest = blake3()
        for name in sorted(self._patches):
            _, (weight, *patches) = self._patches[name]
            digest.update(repr((name, self.shapes[name], str(weight[0].dtype))).encode())
            update_digest(digest, _head(weight[0]))
            update_digest(digest, patches)
        return digest.hexdigest()

    def _tensor(self, name: str, device: str) -> Tensor:
        key, entries = self._patches[name]
        weight, convert = entries[0]
        if len(entries) == 1:
            return _plain(weight).to(device, self.dtype(name))
        # the same steps as ModelPatcher.patch_weight_to_device (0.30), but for rounding to the
        # weight's type at the end: FP4 is rounded to from the exact sum
        exact = convert(_plain(weight).to(device, torch.float32, copy=True), inplace=True)
        return comfy.lora.calculate_weight(entries[1:], exact, key).float()


def _check_weights_tell_all(model: ModelPatcher) -> None:
    if hasattr(model.model, "engine"):
        raise ModelSourceError(
            "it is a TensorRT engine already",
            "Connect 'Load Diffusion Model' with the original checkpoint.",
        )
    if model.model.model_config.unet_config.get("image_model") not in ("flux", "flux2"):
        kind = type(model.model).__name__
        raise ModelSourceError(
            f"it is a {kind} model, not FLUX",
            "Connect 'Load Diffusion Model' with a FLUX checkpoint.",
        )
    if model.hook_patches:
        raise ModelSourceError(
            "a LoRA is scheduled on it by hooks, so its weights change while it samples",
            "Use 'Load LoRA' before this node instead of hooks.",
        )
    if model.injections:
        names = ", ".join(sorted(model.injections))
        raise ModelSourceError(
            f"'{names}' is injected into it and is not part of its weights",
            "Use 'Load LoRA' instead of a bypass loader.",
        )


def _bfl_name(key: str) -> str:
    name = key.removeprefix(_PREFIX)
    # ComfyUI's RMSNorm calls its parameter weight, BFL's files call it scale
    return name.removesuffix("weight") + "scale" if name.endswith("_norm.weight") else name


def _weight(entries: list[Any]) -> Tensor:
    return entries[0][0]


def _plain(weight: Tensor) -> Tensor:
    return weight.dequantize() if hasattr(weight, "_layout_cls") else weight


def _head(weight: Tensor) -> Tensor:
    stored = getattr(weight, "_qdata", weight).detach()
    return stored.flatten()[: _SAMPLE_BYTES // stored.element_size()]
