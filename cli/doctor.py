"""Command `doctor`: what a bug report needs. It needs no package but Python itself.

A probe that fails is a finding: its error stands where its answer would.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from . import machine_probes, model_probes
from .native_probes import NativeProbe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(chosen: argparse.Namespace) -> int:
    """Run every probe and print what they found."""
    libraries = ("torch", "tensorrt_rtx", "tensorrt")
    # the slow ones look for themselves while the others run
    children = {name: probed(partial(NativeProbe, name)) for name in libraries}
    report: dict[str, Any] = {
        "pack": probed(machine_probes.pack),
        "system": probed(machine_probes.system),
        "memory_bytes": probed(machine_probes.memory_bytes),
        "driver": probed(machine_probes.driver),
        "packages": probed(machine_probes.packages),
        "disk": probed(partial(model_probes.disk, chosen.models)),
        "models": probed(partial(model_probes.models, chosen.models)),
        "machines": probed(partial(model_probes.machines, chosen.models)),
        "durations": probed(partial(model_probes.durations, chosen.models)),
        "leftovers": probed(partial(model_probes.leftovers, chosen.models)),
    }
    for name, child in children.items():
        report[name] = child.result() if isinstance(child, NativeProbe) else child
    if chosen.json:
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(_lines(report, 0)))
    return 0


def probed(probe: Callable[[], Any]) -> Any:
    """Return what a probe returns, or its error in its place."""
    try:
        return probe()
    except Exception as error:  # whatever it is: the rest of the report is what helps
        return {"error": f"{type(error).__name__}: {error}"}


def _lines(value: Any, depth: int) -> list[str]:
    """Write nested values as indented lines."""
    indent = "  " * depth
    lines = []
    items = value.items() if isinstance(value, dict) else (("-", entry) for entry in value)
    for key, entry in items:
        if isinstance(entry, (dict, list)) and entry:
            lines.append(f"{indent}{key}{'' if key == '-' else ':'}")
            lines += _lines(entry, depth + 1)
        else:
            is_size = str(key).endswith("bytes") and isinstance(entry, int)
            text = _size(entry) if is_size else str(entry or "none")
            lines.append(f"{indent}{key}{'' if key == '-' else ':'} {text}")
    return lines


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
