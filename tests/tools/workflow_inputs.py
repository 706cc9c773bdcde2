"""Everything that the shipped workflows load, in its small form."""

from __future__ import annotations

from pathlib import Path

from comfy_in_process import import_comfyui
from pack_import import register_pack
from small_lora import write_small_lora
from small_variants import write_small_variants
from small_workflow import write_calibration_pictures, write_masked_picture

register_pack()
import_comfyui()

from graph_models import write_controlnets  # noqa: E402


def write_small_models(base: Path) -> None:
    """Write pictures, models, a LoRA and a ControlNet below a base folder of ComfyUI."""
    write_calibration_pictures(base / "input")
    write_masked_picture(base / "input")
    write_small_variants(base / "models" / "diffusion_models")
    write_small_lora(base / "models" / "loras")
    write_controlnets(base / "models" / "controlnet")
