"""ComfyUI's memory management for a model whose larger half lives inside an engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_patcher
import torch
from comfy.model_patcher import LowVramPatch

from ..trt_runtime.spec import MAX_LORA_RANK
from .baking import use_baked
from .built_plans import use_built
from .engine_blocks import EngineWeight
from .errors import EngineModelError, EngineWeightError
from .weight_changes import PREFIX, branches, check_patch

EVERYTHING = 1e32
"""More memory than there is, as ComfyUI writes it."""

_NO_MERGE = "Merge the FLUX checkpoints and quantize the result with 'Quantize FLUX to FP4'"


class EnginePatcher(comfy.model_patcher.ModelPatcher):
    """Loads, offloads and frees engine and torch weights together.

    The base class is the plain `ModelPatcher`, not the dynamic one: an engine's memory cannot
    fault in page by page. When memory is short, torch weights are offloaded one by one as usual,
    and after them plans, which then take turns on the GPU. Clones share ``self.model``, so the
    engine hangs there.
    """

    def engine_bytes(self) -> int:
        """Bytes of the engine's weights when ComfyUI gives all the memory that is wanted."""
        return self.model.engine.bytes_within(self.model.engine_limit)

    def model_size(self) -> int:
        # ``size`` of the constructor would count the placeholders of the engine's weights.
        torch_bytes = sum(weight.nbytes for weight in self.model.parameters())
        torch_bytes -= sum(
            weight.nbytes for linear in self._tabled() for weight in linear.parameters()
        )
        return torch_bytes + self.engine_bytes()

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
    ) -> None:
        model, engine = self.model, self.model.engine
        self._use_adapters()
        if full_load:
            lowvram_model_memory = EVERYTHING
        wanted = EVERYTHING if model.engine_limit is None else model.engine_limit
        share = min(wanted, max(0, lowvram_model_memory))
        engine.limit(None if share == EVERYTHING else int(share))
        engine.load(device_to or self.load_device)
        # a full load of the base class moves every weight there is
        full_load = full_load and not self._tabled()
        super().load(
            device_to,
            lowvram_model_memory=max(0, lowvram_model_memory - engine.resident_bytes),
            force_patch_weights=force_patch_weights,
            full_load=full_load,
        )
        self._keep_tabled_weights_in_main_memory()
        if not full_load:  # a full load has already stored model_size()
            model.model_loaded_weight_memory += engine.resident_bytes
        if engine.resident_bytes < self.engine_bytes():
            # else the base class thinks that there is nothing left to load
            model.model_lowvram = True

    def partially_unload(
        self,
        device_to: torch.device,
        memory_to_free: float = 0,
        force_patch_weights: bool = False,
    ) -> float:
        freed: float = super().partially_unload(device_to, memory_to_free, force_patch_weights)
        if freed < memory_to_free:
            engine = self.model.engine
            before = engine.resident_bytes
            engine.limit(max(0, int(before - (memory_to_free - freed))))
            evicted = before - engine.resident_bytes
            self.model.model_loaded_weight_memory -= evicted
            freed += evicted
        return freed

    def unpatch_model(
        self, device_to: torch.device | None = None, unpatch_weights: bool = True
    ) -> None:
        if unpatch_weights:
            for linear in self._tabled():
                comfy.model_patcher.wipe_lowvram_weight(linear)
        super().unpatch_model(device_to, unpatch_weights)

    def pre_run(self) -> None:
        super().pre_run()
        self.model.attention_masks.begin_sampling()

    def patch_hooks(self, hooks: Any) -> None:
        super().patch_hooks(hooks)
        if hooks is not None:
            self._forget_modulation()

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        if self.hook_backup:
            self._forget_modulation()
        super().unpatch_hooks(whitelist_keys_set)

    def detach(self, unpatch_all: bool = True) -> Any:
        model = super().detach(unpatch_all)
        # False means that a clone takes over the same loaded model.
        if unpatch_all:
            self.model.engine.unload()
        return model

    def add_patches(
        self, patches: dict[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0
    ) -> list[Any]:
        self._check_patches(patches)
        return super().add_patches(patches, strength_patch, strength_model)

    def add_hook_patches(
        self,
        hook: Any,
        patches: dict[Any, Any],
        strength_patch: float = 1.0,
        strength_model: float = 1.0,
    ) -> list[Any]:
        self._refuse_engine_weights(patches, "This scheduled LoRA changes")
        return super().add_hook_patches(hook, patches, strength_patch, strength_model)

    def add_weight_wrapper(self, name: str, function: Any) -> None:
        self._refuse_engine_weights([name], "A node wraps")
        super().add_weight_wrapper(name, function)

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[Any]]:
        # Merge nodes ask for a prefix and would silently merge the torch half only; weight hooks
        # ask without one and look up nothing but the keys they patch.
        if filter_prefix is not None:
            raise EngineModelError("cannot be merged with another model", _NO_MERGE)
        return {
            key: [(self._unpatched(key, weight), _unchanged), *self.patches.get(key, [])]
            for key, weight in self.model.named_parameters()
        }

    def state_dict_for_saving(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        raise EngineModelError(
            "cannot be saved as a checkpoint",
            "Its quantized checkpoint is already in the model folder 'flux_fp4'",
        )

    def _load_list(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Leave the table's Linears out of what the base class moves between devices."""
        tabled = {id(linear) for linear in self._tabled()}
        # entries end with module and parameters
        return [e for e in super()._load_list(*args, **kwargs) if id(e[-2]) not in tabled]

    def _tabled(self) -> Sequence[Any]:
        table = self.model.modulation
        return () if table is None else table.linears

    def _keep_tabled_weights_in_main_memory(self) -> None:
        """Do what the base class does for offloaded Linears (ComfyUI 0.30, ``load``)."""
        names = {id(module): name for name, module in self.model.named_modules()}
        for linear in self._tabled():
            comfy.model_patcher.wipe_lowvram_weight(linear)
            for parameter, _ in linear.named_parameters(recurse=False):
                key = f"{names[id(linear)]}.{parameter}"
                functions = getattr(linear, f"{parameter}_function")
                if key in self.patches:
                    _, set_func, convert = comfy.model_patcher.get_key_weight(self.model, key)
                    functions.append(LowVramPatch(key, self.patches, convert, set_func))
                functions.extend(self.weight_wrapper_patches.get(key, ()))
                self.pin_weight_to_device(key)
            linear.prev_comfy_cast_weights = linear.comfy_cast_weights
            linear.comfy_cast_weights = True
        if getattr(self.model, "tabled_uuid", None) != self.patches_uuid:
            self._forget_modulation()
            self.model.tabled_uuid = self.patches_uuid

    def _forget_modulation(self) -> None:
        if self.model.modulation is not None:
            self.model.modulation.forget()

    def _unpatched(self, key: str, weight: torch.Tensor) -> torch.Tensor:
        if key in self.hook_backup:
            return self.hook_backup[key][0]
        return self.backup[key].weight if key in self.backup else weight

    def _use_adapters(self) -> None:
        """Bring the engine to what the patches say; makes what is missing for that."""
        model = self.model
        # what was baked may be gone from disk by the time it is loaded again
        in_place = model.engine.loaded or not model.bakes_lora
        if getattr(model, "adapters_uuid", None) == self.patches_uuid and in_place:
            return
        model.adapters_uuid = None  # unknown, should one of these fail halfway
        if model.bakes_lora:
            use_baked(model, self.patches, self.load_device)
        else:
            self._use_branches()
        model.adapters_uuid = self.patches_uuid

    def _use_branches(self) -> None:
        model = self.model
        # only patches that act count, so no strength is the base again, bit for bit
        adapters = branches(
            self.patches, model.checkpoint, model.plan_linears, MAX_LORA_RANK, self.load_device
        )
        use_built(model.engine, replace(model.engine.selection, adapters=adapters, baked=None))

    def _check_patches(self, patches: Mapping[Any, Any]) -> None:
        inside = self._inside()
        refused = []
        for key, patch in patches.items():
            # a key with a slice of the weight comes as (key, offset, function)
            name, offset = (key, None) if isinstance(key, str) else (key[0], key[1])
            if name not in inside:
                continue
            weight, parameter = inside[name]
            linear = weight.name.split(".", 2)[2]
            block = weight.name.removesuffix(f".{linear}")
            if parameter == "weight" and linear in self.model.plan_linears[block]:
                check_patch(name, patch, offset, weight.shapes[parameter])
            else:
                refused.append(f"{weight.name}.{parameter}")
        if refused:
            raise EngineWeightError(sorted(refused), "This LoRA or weight patch changes")

    def _refuse_engine_weights(self, patches: Iterable[Any], reason: str) -> None:
        inside = self._inside()
        keys = [patch if isinstance(patch, str) else patch[0] for patch in patches]
        touched = {inside[key] for key in keys if key in inside}
        if touched:
            raise EngineWeightError(sorted(f"{w.name}.{key}" for w, key in touched), reason)

    def _inside(self) -> dict[str, tuple[EngineWeight, str]]:
        """Return the placeholder and parameter of every weight inside the engine, by full name."""
        return {
            f"{PREFIX}{weight.name}.{parameter}": (weight, parameter)
            for weight in self.model.modules()
            if isinstance(weight, EngineWeight)
            for parameter in weight.shapes
        }


def _unchanged(weight: torch.Tensor, **_kwargs: Any) -> torch.Tensor:
    return weight
