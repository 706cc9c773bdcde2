"""Command `list`: checkpoints and engines with their state."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from .folders import model_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(chosen: argparse.Namespace) -> int:
    """Print what there is."""
    from .inventory import inventory
    from .tables import print_table

    found = inventory(model_folders(chosen.models))
    if chosen.json:
        print(json.dumps(found, indent=1))
        return 0
    checkpoints = found["checkpoints"]
    if not checkpoints:
        places = " or ".join(f"'{folder}'" for folder in found["models"])
        print(f"No quantized checkpoint in {places}. The command `quantize` makes one.")
    else:
        header: tuple[str, ...] = ("checkpoint", "model", "recipe", "size", "ONNX", "state")
        print_table(header, [_checkpoint_row(entry) for entry in checkpoints])
    engines = [engine for entry in checkpoints for engine in entry["engines"]]
    if engines:
        header = ("engine", "targets", "up to", "size", "built with", "last use", "state")
        print_table(header, [_engine_row(entry) for entry in engines])
    for path in found["unfinished"]:
        print(f"unfinished quantization, the same command goes on with it: {path}")
    return 0


def _checkpoint_row(entry: dict[str, Any]) -> tuple[str, ...]:
    return (
        entry["name"],
        entry.get("variant", ""),
        entry.get("recipe", ""),
        _megabytes(entry["bytes"]),
        "yes" if entry.get("exported") else "no",
        entry["state"],
    )


def _engine_row(entry: dict[str, Any]) -> tuple[str, ...]:
    limits = ""
    if "max_batch" in entry:
        limits = (
            f"{entry['max_img_tokens']} image, {entry['max_txt_tokens']} text tokens, "
            f"batch {entry['max_batch']}"
        )
    return (
        entry["name"],
        ", ".join(entry.get("targets", ())),
        limits,
        _megabytes(entry["bytes"]),
        entry.get("built_with", ""),
        time.strftime("%Y-%m-%d", time.localtime(entry["used"])),
        entry["state"] + (" (open)" if entry["in_use"] else ""),
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
