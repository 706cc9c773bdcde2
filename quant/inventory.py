"""Which quantized checkpoints lie in the model folders, told by their headers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors.files import QuantizedCheckpointError
from .model_folders import ModelFolders, checkpoint_file
from .quantized_checkpoint import QuantizedCheckpoint, QuantizedMetadata


@dataclass(frozen=True)
class StoredCheckpoint:
    """A quantized checkpoint as it lies on disk.

    Attributes:
        folder: Where it and its engines are.
        bytes: Its size.
        is_exported: Whether there are ONNX files beside it.
        metadata: What its header says; None if it cannot be read.
        fault: Why it cannot be read; empty if it can.
    """

    folder: Path
    bytes: int
    is_exported: bool
    metadata: QuantizedMetadata | None
    fault: str = ""

    @property
    def name(self) -> str:
        """The name that nodes and commands show."""
        return self.folder.name

    @property
    def content_digest(self) -> str | None:
        """Digest of its tensors; None if it cannot be read."""
        return self.metadata.content_digest if self.metadata else None


def stored_checkpoints(folders: ModelFolders) -> list[StoredCheckpoint]:
    """List every quantized checkpoint, also those that cannot be read."""
    return [stored_checkpoint(folder) for folder in sorted(folders.checkpoint_folders())]


def stored_checkpoint(folder: Path) -> StoredCheckpoint:
    """Describe the quantized checkpoint of a folder, which must hold one."""
    path = checkpoint_file(folder)
    size, is_exported = path.stat().st_size, any(folder.glob("*_blocks.0.onnx"))
    try:
        metadata = QuantizedCheckpoint.read(path).metadata
    except QuantizedCheckpointError as error:
        return StoredCheckpoint(folder, size, is_exported, None, error.reason)
    return StoredCheckpoint(folder, size, is_exported, metadata)
