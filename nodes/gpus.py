"""The picker of GPUs whose peaks are known, and the GPU of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_management
from comfy_api.latest import io

from ..quant.roofline.gpus import device_peaks, gpu_peaks, known_gpus
from .errors import NoGpuError

if TYPE_CHECKING:
    from ..quant.roofline.gpus import GpuPeaks

THIS = "this GPU"


def gpu_input() -> io.Combo.Input:
    """Return the picker."""
    return io.Combo.Input(
        "gpu",
        display_name="GPU",
        options=[THIS, *known_gpus()],
        default=THIS,
        tooltip="Whose limits to show: of this machine, or of one that you think of buying. "
        "Laptop GPUs are others than desktop GPUs of nearly the same name.",
    )


def chosen_peaks(gpu: str) -> GpuPeaks:
    """Return the peaks of what was picked.

    Raises:
        NoGpuError: This machine has no CUDA GPU.
        UnknownGpuError: The peaks of this machine's GPU are not known.
    """
    if gpu != THIS:
        return gpu_peaks(gpu)
    device = comfy.model_management.get_torch_device()
    if device.type != "cuda":
        raise NoGpuError(str(device))
    return device_peaks(device)
