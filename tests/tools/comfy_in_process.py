"""Import ComfyUI's modules into a test process, on the CPU and without its server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from small_model_files import ROOT


def import_comfyui() -> None:
    """Make `comfy`, `folder_paths` and the rest importable; computation stays on the CPU."""
    path = Path(os.environ.get("COMFYUI_PATH", ROOT / ".comfyui"))
    if not (path / "main.py").is_file():
        raise FileNotFoundError(f"'{path}' is not a ComfyUI tree: run 'make comfyui'")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    import comfy.cli_args

    # read once, when comfy.model_management is imported
    comfy.cli_args.args.cpu = True
