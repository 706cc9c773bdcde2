"""The digest over everything in a quantized checkpoint but its header."""

from __future__ import annotations

from collections.abc import Mapping

from blake3 import blake3

from .errors.files import QuantizedCheckpointError
from .progress import Progress
from .quantized_checkpoint import QuantizedCheckpoint

READ_BYTES = 8 << 20


def content_digest(tensors: Mapping[str, str]) -> str:
    """Return the digest over names and bytes of all tensors.

    Args:
        tensors: blake3 of each tensor's bytes, hexadecimal, by name.
    """
    digest = blake3()
    for name in sorted(tensors):
        digest.update(f"{name}\0{tensors[name]}\0".encode())
    return digest.hexdigest()


def check_content(checkpoint: QuantizedCheckpoint, progress: Progress) -> None:
    """Read every tensor of a checkpoint and compare with the digest in its header.

    Args:
        checkpoint: Its header.
        progress: Called before each tensor; may raise to cancel.

    Raises:
        QuantizedCheckpointError: The bytes are others than those that were written.
    """
    found = {}
    with checkpoint.path.open("rb") as file:
        for done, (name, place) in enumerate(checkpoint.tensors.items()):
            progress(f"Verifying {checkpoint.name}", done, len(checkpoint.tensors))
            digest, left = blake3(), place.length
            file.seek(place.offset)
            while left and (chunk := file.read(min(left, READ_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
            found[name] = digest.hexdigest()
    if content_digest(found) != checkpoint.metadata.content_digest:
        reason = "its tensors are not those that were written (wrong digest)"
        raise QuantizedCheckpointError(checkpoint.path.name, reason)
