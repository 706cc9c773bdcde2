"""The small trained model in the shapes of FLUX's variants, drawing the same digits.

Fill, Canny and Depth have more channels going in; here their weights are zero. schnell has no
guidance; here what guidance 3.5 adds is in the bias of the time embedding.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_model_files import DATA, DIFFUSION_MODEL
from torch import Tensor

FILL = "small_flux_fill.safetensors"
CONTROL = "small_flux_control.safetensors"
SCHNELL = "small_flux_schnell.safetensors"

GUIDANCE = 3.5
"""What the small model was trained with."""

PATCHES = {FILL: 384, CONTROL: 128}
"""Width of ``img_in``: patches of 2 x 2 of 96 channels, and of 32."""


def write_small_variants(folder: Path) -> None:
    """Write all variants into a folder of diffusion models."""
    state = load_file(DATA / DIFFUSION_MODEL)
    for name, width in PATCHES.items():
        weight = state["img_in.weight"]
        wider = torch.zeros(len(weight), width, dtype=weight.dtype)
        wider[:, : weight.shape[1]] = weight
        save_file({**state, "img_in.weight": wider}, folder / name)
    save_file(_without_guidance(state), folder / SCHNELL)


def _without_guidance(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from flux_fp4.quant.flux.layers import timestep_embedding

    def guidance(part: str) -> Tensor:
        return state[f"guidance_in.{part}"].float()

    embedded = timestep_embedding(torch.tensor([GUIDANCE]), guidance("in_layer.weight").shape[1])
    hidden = embedded @ guidance("in_layer.weight").T + guidance("in_layer.bias")
    added = torch.nn.functional.silu(hidden) @ guidance("out_layer.weight").T
    added = added[0] + guidance("out_layer.bias")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("guidance_in")}
    bias = kept["time_in.out_layer.bias"]
    return {**kept, "time_in.out_layer.bias": (bias.float() + added).to(bias.dtype)}
