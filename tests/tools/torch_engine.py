"""An engine that computes block plans with ComfyUI's own torch blocks, for tests without plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.memory_management
import pytest
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, ModulationOut, SingleStreamBlock
from flux_fp4.nodes.engine_model import EngineOptions, build_engine_model
from flux_fp4.nodes.engine_patcher import EnginePatcher
from flux_fp4.quant.flux.config import block_linears
from flux_fp4.quant.modulation import is_modulation_weight, stored_modulation
from flux_fp4.quant.quantized_checkpoint import is_in_plan
from flux_fp4.quant.recipe import Format
from flux_fp4.trt_runtime.errors.engine import VariantPlanMissingError
from flux_fp4.trt_runtime.selection import Selection
from torch import Tensor

DEFAULT = EngineOptions()


class TorchEngine:
    """Has the methods of `trt_runtime.engine.Engine` that a MODEL uses, and counts their calls."""

    weight_bytes = 5_000_000
    folder = Path("small")

    def __init__(self, blocks: Mapping[str, DoubleStreamBlock | SingleStreamBlock]) -> None:
        """Take stock blocks by name; their own modulation is not used."""
        self.blocks = blocks
        self.device: torch.device | None = None
        self.loads = self.unloads = self.runs = 0
        self.limit_bytes: int | None = None
        self.selection = Selection()
        self.originals: dict[tuple[str, str], Tensor] = {}
        for block in blocks.values():
            # ComfyUI's own switch for models whose modulation is computed elsewhere (FLUX.2)
            block.modulation = False if isinstance(block, DoubleStreamBlock) else None

    @property
    def resident_bytes(self) -> int:
        return self.bytes_within(self.limit_bytes) if self.loaded else 0

    def bytes_within(self, limit: int | None) -> int:
        """Plans of a tenth each, of which the last place is for all that do not fit."""
        plan = self.weight_bytes // 10
        return self.weight_bytes if limit is None else min(10, max(1, limit // plan)) * plan

    def limit(self, weight_bytes: int | None) -> None:
        self.limit_bytes = weight_bytes

    @property
    def loaded(self) -> bool:
        return self.device is not None

    def load(self, device: torch.device) -> None:
        if self.device is None:
            self.loads += 1
        self.device = device

    def unload(self) -> None:
        self.unloads += self.device is not None
        self.device = None

    def activation_bytes(self, batch: int, img_tokens: int, txt_tokens: int) -> int:
        return 1000 * batch * (img_tokens + txt_tokens)

    def use(self, selection: Selection) -> None:
        """Add factors to the stock weights, from copies made before the first time."""
        self.selection = selection
        for block, module in self.blocks.items():
            for linear in block_linears(block):
                weight = module.get_submodule(linear).weight
                base = self.originals.setdefault((block, linear), weight.detach().clone())
                factors = selection.adapters.get(block, {}).get(linear)
                change = 0 if factors is None else (factors.down @ factors.up).mT
                weight.data.copy_(base + change)

    def run(self, block: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.loaded, f"{block} ran before load()"
        self.runs += 1
        assert ("mask" in inputs) == self.selection.masked, f"{block} has no such input"
        cos, sin, mask = inputs["cos"], inputs["sin"], inputs.get("mask")
        pe = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))[:, None]
        module = self.blocks[block]
        if isinstance(module, SingleStreamBlock):
            x = module(inputs["x"].clone(), vec=_modulation(inputs, "mod"), pe=pe, attn_mask=mask)
            return {"x_out": x}
        vec = tuple(
            tuple(_modulation(inputs, f"{stream}_mod{part}") for part in (1, 2))
            for stream in ("img", "txt")
        )
        img, txt = inputs["img"].clone(), inputs["txt"].clone()
        img, txt = module(img, txt, vec=vec, pe=pe, attn_mask=mask)
        return {"img_out": img, "txt_out": txt}


class TorchCheckpoint:
    """Has what a MODEL asks of a quantized checkpoint, over a stock FLUX's own weights."""

    name = "small"

    def __init__(self, flux: torch.nn.Module) -> None:
        self.weights = {name: weight.clone() for name, weight in flux.state_dict().items()}

    def linear_tensors(self, linear: str, weight: bool = True) -> dict[str, Tensor]:
        relative = linear.split(".", 2)[2]
        return {f"{relative}.weight": self.weights[f"{linear}.weight"]} if weight else {}

    def linear_shape(self, linear: str) -> tuple[int, int]:
        rows, columns = self.weights[f"{linear}.weight"].shape
        return rows, columns


def weights_outside_of_plans(flux: torch.nn.Module, modulation: Format) -> dict[str, Tensor]:
    """Copies of a stock FLUX's weights that are not the engine's; modulation stored as given."""
    weights: dict[str, Tensor] = {}
    for name, weight in flux.state_dict().items():
        if modulation != "bf16" and is_modulation_weight(name):
            weights |= stored_modulation(name, weight, modulation)
        elif not is_in_plan(name):
            weights[name] = weight.clone()
    return weights


def engine_over(
    stock: Any,
    dynamic_vram: bool = False,
    modulation: Format = "bf16",
    options: EngineOptions = DEFAULT,
) -> EnginePatcher:
    """Make an engine-backed MODEL that computes with the blocks of a stock model, using it up."""
    flux, config = stock.model.diffusion_model, stock.model.model_config
    blocks = {f"double_blocks.{i}": block for i, block in enumerate(flux.double_blocks)}
    blocks |= {f"single_blocks.{i}": block for i, block in enumerate(flux.single_blocks)}
    weights, checkpoint = weights_outside_of_plans(flux, modulation), TorchCheckpoint(flux)
    unet_config = {key: value for key, value in config.unet_config.items() if key != "dtype"}
    cpu = torch.device("cpu")
    # ComfyUI's modules are built in another way while DynamicVRAM is on, the default on NVIDIA GPUs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.memory_management, "aimdo_enabled", dynamic_vram)
        model = build_engine_model(
            unet_config,
            weights,
            TorchEngine(blocks),
            {block: block_linears(block) for block in blocks},
            checkpoint,
            77,
            cpu,
            options,
        )
    return EnginePatcher(model, cpu, cpu)


def _modulation(inputs: Mapping[str, Tensor], prefix: str) -> ModulationOut:
    return ModulationOut(*(inputs[f"{prefix}_{part}"] for part in ("shift", "scale", "gate")))


def use_needs_plans(
    monkeypatch: pytest.MonkeyPatch, engine: Any, missing: Callable[[Selection], Sequence[str]]
) -> None:
    """Have an engine refuse selections as that of a GPU does, whose plans are to be built first."""
    use = engine.use

    def refusing(selection: Selection) -> None:
        names = missing(selection)
        if names:
            raise VariantPlanMissingError(names)
        use(selection)

    monkeypatch.setattr(engine, "use", refusing)
