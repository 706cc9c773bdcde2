"""What GPUs can do at best, from the data file beside this module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors.speed import UnknownGpuError
from ..recipe import Format

if TYPE_CHECKING:
    import torch

_FILE = Path(__file__).with_name("gpus.yaml")


@dataclass(frozen=True)
class GpuPeaks:
    """Peaks of a GPU.

    Attributes:
        name: As torch names it, without "NVIDIA".
        sm: Compute capability, such as ``sm120``.
        operations: Dense tensor operations per second by format, accumulated in fp32; a format that
            is absent has no tensor cores there.
        bandwidth: Of its memory, bytes per second.
        memory: Bytes; the smallest that is sold under the name, unless it was asked.
        bus: From main memory, bytes per second.
        source: Where the figures come from.
    """

    name: str
    sm: str
    operations: Mapping[Format, float]
    bandwidth: float
    memory: float
    bus: float
    source: str


@cache
def known_gpus() -> Mapping[str, GpuPeaks]:
    """Return all GPUs of the data file by name, the fastest of each generation first."""
    data = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return {name: _peaks(name, entry, data) for name, entry in data["gpus"].items()}


def gpu_peaks(name: str, memory: float | None = None) -> GpuPeaks:
    """Return the peaks of a GPU.

    Args:
        name: As torch or the data file names it. Laptop GPUs have names of their own, and are not
            the desktop GPUs of nearly the same name.
        memory: Bytes that the GPU at hand has; None takes the data file's.

    Raises:
        UnknownGpuError: The data file does not have it.
    """
    plain = name.removeprefix("NVIDIA ").strip()
    found = next((gpu for key, gpu in known_gpus().items() if key.lower() == plain.lower()), None)
    if found is None:
        raise UnknownGpuError(name, list(known_gpus()))
    if memory is None:
        return found
    return GpuPeaks(**{**vars(found), "memory": memory})


def device_peaks(device: torch.device | int) -> GpuPeaks:
    """Return the peaks of a CUDA device of this machine, with the memory that it has.

    Raises:
        UnknownGpuError: The data file does not have it.
    """
    import torch

    memory = torch.cuda.get_device_properties(device).total_memory
    return gpu_peaks(torch.cuda.get_device_name(device), memory)


def _peaks(name: str, entry: Mapping[str, Any], data: Mapping[str, Any]) -> GpuPeaks:
    architecture = data["architectures"][entry["architecture"]]
    if "tflops" in entry:
        operations = {unit: 1e12 * value for unit, value in entry["tflops"].items()}
    else:
        clocks = entry["sms"] * 1e6 * entry["boost_mhz"]
        operations = {unit: value * clocks for unit, value in architecture["operations"].items()}
    return GpuPeaks(
        name=name,
        sm=architecture["sm"],
        operations=operations,
        bandwidth=1e9 * entry["bandwidth_gb_s"],
        memory=float(min(entry["vram_gib"]) << 30),
        bus=1e9 * entry["pcie_gb_s"],
        source=data["sources"][entry["source"]],
    )
