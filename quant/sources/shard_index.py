"""The index of a sharded checkpoint: which file beside it holds which tensor.

``{"metadata": {...}, "weight_map": {"<tensor>": "<file>"}}``, as huggingface_hub writes it. A file
name is followed only to a file beside the index: an index comes with a download, and must not make
us open anything else.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError

from ..errors.sources import DamagedCheckpointError
from ..safetensors_header import parse_json_object

INDEX_SUFFIX = ".safetensors.index.json"

_MAX_INDEX_BYTES = 4 * 2**20
"""FLUX.1's index has 0.1 MB."""

_MAX_NAME_BYTES = 255
"""Of a file name, on every usual file system; the system's answer to a longer one is an error."""

_PLAIN_NAME = re.compile(r"[^<>:\"/\\|?*\x00-\x1f]+\.safetensors")
"""One file name, without what separates folders or names drives and streams on any system."""


def read_index(path: Path) -> Mapping[str, str]:
    """Return the file name of the shard by tensor name; every shard exists beside the index.

    Raises:
        DamagedCheckpointError: The index is no such index, or names a file that is not there or
            that lies elsewhere.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_INDEX_BYTES:
            reason = f"the index has {size} bytes, the limit is {_MAX_INDEX_BYTES}"
            raise DamagedCheckpointError(path.name, reason)
        entries = parse_json_object(path.read_bytes(), "the index")
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(path.name, str(error)) from error
    weight_map = entries.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedCheckpointError(path.name, "the index has no 'weight_map'")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            reason = f"the index names no file for '{tensor}' but {reprlib.repr(shard)}"
            raise DamagedCheckpointError(path.name, reason)
    for shard in sorted(set(weight_map.values())):
        _check_shard(path, shard)
    return weight_map


def _check_shard(index: Path, shard: str) -> None:
    size = len(shard.encode("utf-8", "surrogatepass"))
    if not _PLAIN_NAME.fullmatch(shard) or size > _MAX_NAME_BYTES:
        reason = f"the index names {shard[:200]!r}, which is not a safetensors file beside it"
        raise DamagedCheckpointError(index.name, reason, "Get the index anew from its source.")
    file = index.parent / shard
    if not file.is_file():
        reason = f"its shard '{shard}' is not in '{index.parent.name}'"
        raise DamagedCheckpointError(index.name, reason, f"Get '{shard}' and put it there.")
    # Hugging Face's cache links index and shards into one folder of blobs; any other link leads out
    if file.resolve().parent not in (index.parent.resolve(), index.resolve().parent):
        reason = f"its shard '{shard}' is a link to another folder"
        raise DamagedCheckpointError(index.name, reason, "Put the file itself beside the index.")
