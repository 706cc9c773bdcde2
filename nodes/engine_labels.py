"""What the picker of engines says of each: model, recipe, and whether it can be used.

The texts travel with the input's own description in ``/object_info``, and web/js/engine_labels.js
puts them into the picker. Values of workflows stay the plain names.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from . import paths
from .errors import ArtifactNotFoundError

OPTION = "flux_fp4_labels"

_PLAIN = re.compile(r"[\w.+-]{1,60}")
"""A checkpoint of a stranger can name any variant, and menus of the frontend read HTML."""


def engine_labels() -> dict[str, dict[str, str]]:
    """Return further options of an engine input: what to show, by the name that workflows store."""
    return {OPTION: {name: _label(name) for name in paths.engines()}}


def _label(name: str) -> str:
    from ..quant.errors.files import QuantizedCheckpointError
    from ..trt_runtime.glance import freshness

    try:
        folder = paths.engine_folder(name)
        checkpoint = paths.engine_checkpoint(folder)
        state = checkpoint.stat()
        made, digest = _made(checkpoint, state.st_mtime_ns, state.st_size)
    except (ArtifactNotFoundError, OSError, QuantizedCheckpointError):
        return name
    shown = [part if _PLAIN.fullmatch(part) else "?" for part in made]
    return " \u00b7 ".join([name, *shown, freshness(folder, digest)])


@lru_cache(maxsize=256)
def _made(path: Path, _mtime_ns: int, _bytes: int) -> tuple[tuple[str, str], str]:
    """Return model, recipe and content digest; the frontend asks often, and a header is large."""
    from ..quant.quantized_checkpoint import QuantizedCheckpoint

    metadata = QuantizedCheckpoint.read(path).metadata
    return (metadata.variant, metadata.options.recipe.name), metadata.content_digest
