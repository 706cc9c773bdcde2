"""The parser of all commands, and what they return to the shell."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..quant.errors import QuantError
from ..trt_runtime.errors import EngineError
from .errors import CommandError
from .folders import PACK

OK, FAILED, CANCELLED = 0, 1, 130

COMMANDS = {
    "doctor": ("doctor", "show what a bug report needs"),
    "list": ("listing", "show quantized checkpoints and engines, and whether they are up to date"),
    "quantize": ("quantize", "quantize a FLUX checkpoint"),
    "qad": ("distill", "train a quantized checkpoint against its original, on one GPU or many"),
    "export": ("export", "write the ONNX files of a quantized checkpoint"),
    "build": ("build", "build an engine from the ONNX files of a quantized checkpoint"),
    "bench": ("bench", "measure an engine on this machine, beside bf16 in PyTorch"),
    "rebuild": ("rebuild", "build stale engines again"),
    "verify": ("verify", "check every digest of a quantized checkpoint or an engine"),
    "quality": ("quality", "measure pictures, or a quantized checkpoint, against the original"),
    "gc": ("collect", "show what is not needed, and delete it on request"),
    "probe": ("native_probes", ""),
}
"""By name: the module of this package with its ``add_arguments`` and ``run``, and what it does.
`probe` is for `doctor`, which looks at native libraries from a process of its own."""

_NODES = {
    "Quantize FLUX to FP4": "quantize",
    "Export FLUX FP4 to ONNX": "export",
    "Build TensorRT Engine": "build",
    "FLUX FP4 Engine Manager": "rebuild",
}
"""Errors of the layers below name nodes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    chosen = _parser().parse_args(arguments)
    level = logging.INFO if getattr(chosen, "verbose", False) else logging.WARNING
    logging.basicConfig(format="%(message)s", level=level)
    try:
        return int(_module(COMMANDS[chosen.command][0]).run(chosen))
    except KeyboardInterrupt:
        return _ended("Cancelled. Finished blocks are kept: the same command goes on.", CANCELLED)
    except (CommandError, QuantError, EngineError) as error:
        return _ended(f"{error}{_commands_in(str(error))}", FAILED)
    except ImportError as error:
        install = f"{sys.executable} -m pip install -r {PACK / 'requirements.txt'}"
        return _ended(f"A Python package is missing: {error}. Install all with: {install}", FAILED)
    except OSError as error:
        return _ended(
            f"The system refused a file: {error}. Check its folder and try again.", FAILED
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flux_fp4",
        description="Quantize FLUX to NVFP4 and build TensorRT engines, outside of ComfyUI.",
        epilog="Exit codes: 0 done, 1 refused or failed, 2 wrong arguments, 130 cancelled.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        if not summary:
            # without help a command is not listed
            _module(module).add_arguments(commands.add_parser(name))
            continue
        command = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        command.add_argument("--verbose", action="store_true", help="log what is done")
        command.add_argument(
            "--models",
            type=Path,
            action="append",
            metavar="DIR",
            help="folder of quantized checkpoints and engines; may be given several times, what is "
            "new goes into the first (default: the flux_fp4 folders of the ComfyUI tree whose "
            "custom_nodes holds this pack, those of its extra_model_paths.yaml included)",
        )
        _module(module).add_arguments(command)
    return parser


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def _commands_in(message: str) -> str:
    named = [
        f"{node!r} is the command `{name}`" for node, name in _NODES.items() if node in message
    ]
    return f" (Here {', '.join(named)}.)" if named else ""


def _ended(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
