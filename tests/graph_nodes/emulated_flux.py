"""ComfyUI's own FLUX with the arithmetic of a quantized checkpoint, for comparison."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.sd
import folder_paths
from torch import Tensor, nn
from torch.nn import functional

PACK = "ComfyUI-FLUX-FP4"


class EmulatedLinear(nn.Module):
    """A Linear that rounds as stored, with a weight that ComfyUI can patch.

    What a LoRA changes of ``weight`` runs beside the rounded product, on the unrounded input: so
    does the engine's variant.
    """

    def __init__(self, stored: Any, effective: Tensor) -> None:
        super().__init__()
        self.stored = [stored]  # not a submodule: nobody shall patch or move it
        self.original = [effective.clone()]
        self.weight = nn.Parameter(effective.clone(), requires_grad=False)
        bias = None if stored.bias is None else stored.bias.clone()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stored[0](x)
        change = self.weight - self.original[0]
        return y + functional.linear(x, change) if change.any() else y


def load_emulated_flux(name: str) -> Any:
    """Return a MODEL for ``<name>/<name>.safetensors`` in the model folder ``flux_fp4``."""
    quant = _pack()
    path = Path(folder_paths.models_dir, "flux_fp4", name, f"{name}.safetensors")
    checkpoint = quant.quantized_checkpoint.QuantizedCheckpoint.read(path)
    assert not checkpoint.metadata.fp8_attention, "stock attention stays as it is"
    emulated, state = {}, {}
    for block in checkpoint.metadata.config.block_names:
        tensors = checkpoint.block_tensors(block)
        for linear in quant.config.block_linears(block):
            bias = tensors.get(f"{linear}.bias")
            bias = None if bias is None else bias.float()
            stored = quant.emulation.emulated_linear(linear, tensors, bias)
            effective = quant.weight_factors.stored_weight(linear, tensors)
            emulated[f"{block}.{linear}"] = (stored, effective)
            state[f"{block}.{linear}.weight"] = effective
            if bias is not None:
                state[f"{block}.{linear}.bias"] = bias
        for key, tensor in tensors.items():
            if ".norm." in f".{key}" or ".modulation." in f".{key}" or "_mod." in key:
                state[f"{block}.{key}"] = tensor.float()
    for key, tensor in checkpoint.high_precision_state_dict().items():
        state[key] = tensor.float()
    model = comfy.sd.load_diffusion_model_state_dict(state, disable_dynamic=True)
    for linear, (stored, effective) in emulated.items():
        parent, _, leaf = linear.rpartition(".")
        owner = model.model.diffusion_model.get_submodule(parent)
        setattr(owner, leaf, EmulatedLinear(stored, effective))
    return model


def _pack() -> Any:
    """Return the modules of the pack under the name that ComfyUI has given it."""
    import importlib

    (name,) = (n for n in sys.modules if n.endswith(PACK) and hasattr(sys.modules[n], "__path__"))
    pack = ModuleType("quant")
    for module in ("quantized_checkpoint", "emulation", "weight_factors"):
        setattr(pack, module, importlib.import_module(f"{name}.quant.{module}"))
    pack.config = importlib.import_module(f"{name}.quant.flux.config")
    return pack
