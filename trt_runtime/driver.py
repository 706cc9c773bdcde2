"""The NVIDIA driver's version, which torch does not tell."""

from __future__ import annotations

import ctypes
import functools
import sys

UNKNOWN = "unknown"

_BUFFER_BYTES = 80
"""NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE of nvml.h."""


@functools.cache
def driver_version() -> str:
    """Return the driver's version such as "581.15", or "unknown" without NVML."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return UNKNOWN
    if nvml.nvmlInit_v2() != 0:
        return UNKNOWN
    try:
        buffer = ctypes.create_string_buffer(_BUFFER_BYTES)
        failed = nvml.nvmlSystemGetDriverVersion(buffer, _BUFFER_BYTES)
        return UNKNOWN if failed else buffer.value.decode(errors="replace")
    finally:
        nvml.nvmlShutdown()
