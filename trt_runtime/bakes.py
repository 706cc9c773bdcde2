"""Where baked LoRAs lie.

<checkpoint>/baked/<key>/blocks.safetensors    blocks that a LoRA touches, quantized with it
<checkpoint>/baked/<key>/double_blocks.0.onnx  their export
<checkpoint>/baked/<key>/<target>/baked.json   their plans
"""

from __future__ import annotations

import re
from pathlib import Path

from .manifest import BAKED, MANIFEST, UNFINISHED, VARIANTS

BAKES = "baked"
BLOCKS = "blocks.safetensors"
KEY_DIGITS = 32
MANIFESTS = (MANIFEST, UNFINISHED, VARIANTS, BAKED)
"""Files that say which plans are wanted."""

_KEY = re.compile(rf"[0-9a-f]{{{KEY_DIGITS}}}")


def bake_folders(root: Path) -> list[Path]:
    """List the bakes below a checkpoint's folder ``baked``, which need not exist."""
    if not root.is_dir():
        return []
    return [
        folder
        for folder in sorted(root.iterdir())
        if _KEY.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
    ]
