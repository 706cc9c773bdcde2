"""Probes of `doctor` that look at the machine and at Python; only the standard library is used."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import sys
from typing import Any

from .folders import PACK, comfyui_tree

_DISTRIBUTION = "comfyui-flux-fp4"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_VERSION = re.compile(r"""^(?:__version__|version) = ["']([^"']+)["']""", re.MULTILINE)


def pack() -> dict[str, Any]:
    """Tell the pack's version, and that of the ComfyUI tree around it."""
    tree = comfyui_tree()
    return {
        "version": _pack_version(),
        "folder": str(PACK),
        "comfyui": _version_in(tree / "comfyui_version.py") if tree else None,
    }


def system() -> dict[str, Any]:
    """Tell operating system and Python."""
    return {
        "os": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "executable": sys.executable,
    }


def memory_bytes() -> int:
    """Tell the size of main memory."""
    if sys.platform != "win32":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    kilobytes = ctypes.c_ulonglong()
    if not ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes)):
        raise ctypes.WinError()
    return kilobytes.value * 1024


def driver() -> str:
    """Tell the version of the NVIDIA driver."""
    from ..trt_runtime.driver import driver_version

    return driver_version()


def packages() -> dict[str, str | None]:
    """Tell the installed versions of all requirements; None for one that is not installed."""
    listed = PACK / "requirements.txt"
    if listed.is_file():
        lines = listed.read_text(encoding="utf-8").splitlines()
    else:
        lines = importlib.metadata.requires(_DISTRIBUTION) or []
    names = [found[0] for line in lines if (found := _NAME.match(line))]
    return {name: _installed(name) for name in [*names, "torch", "tensorrt"]}


def _pack_version() -> str | None:
    # as a folder in custom_nodes the pack is no installed distribution
    project = PACK / "pyproject.toml"
    return _version_in(project) if project.is_file() else importlib.metadata.version(_DISTRIBUTION)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_in(path: os.PathLike[str]) -> str | None:
    with open(path, encoding="utf-8") as file:
        found = _VERSION.search(file.read())
    return found[1] if found else None
