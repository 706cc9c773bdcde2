"""GPU memory of FLUX.1-dev as an NVFP4 engine at 1024 x 1024, byte by byte, from tensor sizes.

    python benchmarks/vram_account.py

Plan and activation sizes are those of TensorRT-RTX 1.7.1's builder at FLUX.1-dev's size
(`benchmarks/lora_cost.py` builds the same two blocks); everything else is computed from shapes.
What the driver, torch's allocator and compiled kernels take is not in it, and none of it has been
measured on a GPU.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from pack_import import register_pack  # noqa: E402

register_pack()

from flux_fp4.quant.flux.model import tensor_shapes  # noqa: E402
from flux_fp4.quant.modulation import is_modulation_weight  # noqa: E402
from flux_fp4.quant.quantized_checkpoint import is_in_plan  # noqa: E402
from full_size import FLUX1_DEV  # noqa: E402
from recipe_sizes import layout_of  # noqa: E402

PLAN_BYTES = {"double": 131_109_948, "single": 65_202_300}
"""nvfp4-max with FP8 attention, sm120, batch 1, up to 4,096 image and 512 text tokens."""

ACTIVATION_BYTES = 397_246_464
"""Scratch memory of a single block, the larger of the two, at 4,608 tokens."""

TOKENS = 4096 + 512
STREAM_COPIES = 6
"""As in ``nodes/engine_model.py``, here in bf16, which ComfyUI computes in on RTX GPUs."""


@dataclass(frozen=True)
class Account:
    """Bytes on the GPU while FLUX.1-dev samples."""

    plans: int
    torch_weights: int
    modulation_weights: int
    largest_torch_weight: int
    largest_modulation: int
    activations: int
    streams: int

    @property
    def resident(self) -> int:
        """Everything on the GPU."""
        return self.plans + self.torch_weights + self.activations + self.streams

    @property
    def tabled(self) -> int:
        """Modulation in main memory, with room for the largest Linear to pass (the default)."""
        return self.resident - self.modulation_weights + self.passing

    @property
    def passing(self) -> int:
        """As ``ModulationTable.working_bytes`` counts it."""
        return 4 * self.largest_modulation

    @property
    def smallest(self) -> int:
        """As ``tabled``, with one place for the plans to take turns in."""
        return self.tabled - self.plans + max(PLAN_BYTES.values())

    @property
    def offloaded(self) -> int:
        """Torch weights in main memory, of which ComfyUI holds two at a time on the GPU."""
        moving = 2 * self.largest_torch_weight
        return self.plans + moving + self.activations + self.streams


def account(modulation: str) -> Account:
    """Add up by how the modulation weights are stored: ``bf16``, ``fp8`` or ``nvfp4``."""
    layout = layout_of("nvfp4-max", modulation)
    outside = {
        name: dtype.itemsize * torch.Size(shape).numel()
        for name, (dtype, shape) in layout.items()
        if not is_in_plan(name)
    }
    plans = FLUX1_DEV.depth * PLAN_BYTES["double"]
    plans += FLUX1_DEV.depth_single_blocks * PLAN_BYTES["single"]
    streams = STREAM_COPIES * TOKENS * FLUX1_DEV.hidden_size * torch.bfloat16.itemsize
    shapes = tensor_shapes(FLUX1_DEV)
    linears = [name.removesuffix(".weight") for name in shapes if is_modulation_weight(name)]
    modulation = [size for name, size in outside.items() if name.startswith(tuple(linears))]
    return Account(
        plans=plans,
        torch_weights=sum(outside.values()),
        modulation_weights=sum(modulation),
        largest_torch_weight=max(outside.values()),
        largest_modulation=max(torch.Size(shapes[f"{name}.weight"]).numel() for name in linears),
        activations=ACTIVATION_BYTES,
        streams=streams,
    )


def main() -> None:
    print("| | modulation bf16 | fp8 | nvfp4 |\n|---|---|---|---|")
    accounts = [account(modulation) for modulation in ("bf16", "fp8", "nvfp4")]
    rows = {
        "57 plans": "plans",
        "PyTorch weights": "torch_weights",
        "of them modulation in blocks": "modulation_weights",
        "one modulation Linear on its way": "passing",
        "activations of one block": "activations",
        "token streams": "streams",
        "**all on the GPU**": "resident",
        "**modulation in main memory** (default)": "tabled",
        "**all PyTorch weights offloaded**": "offloaded",
        "**default, plans taking turns in one place**": "smallest",
    }
    for label, field in rows.items():
        cells = [f"{getattr(found, field):,}" for found in accounts]
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
