"""The files of a checkpoint: which tensors they store, and reading them.

Files are opened per call and never stay open: the pages that safetensors maps are dropped with the
tensors, so that a checkpoint of 24 GB does not fill the memory block by block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors.sources import DamagedCheckpointError
from ..safetensors_header import StoredTensor, read_header
from .foreign import refuse_other_formats
from .shard_index import INDEX_SUFFIX, read_index

_DIGEST_BYTES = 4096
"""Read of every tensor for the digest: training and merging change every weight everywhere."""

_READ_BYTES = 4 << 20
"""Of one read ahead."""


@dataclass(frozen=True)
class CheckpointFiles:
    """The tensors of one safetensors file, or of the shards that an index names.

    Attributes:
        path: The file, or the index.
        paths: The safetensors files, in order of their names.
        stored: Place by tensor name.
        holders: File by tensor name.
        metadata: Free-form metadata of each file.
    """

    path: Path
    paths: tuple[Path, ...]
    stored: Mapping[str, StoredTensor]
    holders: Mapping[str, Path]
    metadata: tuple[Mapping[str, str], ...]
    states: tuple[tuple[int, int], ...]

    @property
    def sharded(self) -> bool:
        """Whether an index names the files."""
        return self.path.name.endswith(INDEX_SUFFIX)

    @property
    def size_bytes(self) -> int:
        """Size of the safetensors files."""
        return sum(size for size, _ in self.states)

    @contextlib.contextmanager
    def reader(self, device: str) -> Iterator[TensorReader]:
        """Read tensors; each file is opened once, when its first tensor is asked for.

        Raises:
            DamagedCheckpointError: A file cannot be read or has changed since it was opened.
        """
        self._check_unchanged()
        with contextlib.ExitStack() as stack:
            try:
                yield TensorReader(self.holders, device, stack)
            except (OSError, SafetensorError) as error:
                raise DamagedCheckpointError(self.path.name, str(error)) from error

    def read_ahead(self, names: Sequence[str], stopping: Callable[[], bool]) -> None:
        """Read tensors into the system's file cache: mapped later, their pages are there.

        Plain reads of a few megabytes are faster than page faults, and hold no memory of their own.

        Args:
            names: Stored names.
            stopping: Asked before each read; True ends the reading early.

        Raises:
            DamagedCheckpointError: A file cannot be read or has changed since it was opened.
        """
        self._check_unchanged()
        buffer = memoryview(bytearray(_READ_BYTES))
        try:
            for name in sorted(names, key=lambda name: self.stored[name].offset):
                place = self.stored[name]
                with self.holders[name].open("rb", buffering=0) as file:
                    file.seek(place.offset)
                    for start in range(0, place.length, _READ_BYTES):
                        if stopping():
                            return
                        file.readinto(buffer[: min(_READ_BYTES, place.length - start)])
        except OSError as error:
            raise DamagedCheckpointError(self.path.name, str(error)) from error

    def _check_unchanged(self) -> None:
        if tuple(_state(path) for path in self.paths) != self.states:
            reason = "it has changed since it was opened"
            raise DamagedCheckpointError(self.path.name, reason, "Queue the workflow again.")

    def digest(self) -> str:
        """Return the blake3 digest of the headers and of the first 4 KiB of every tensor."""
        digest = blake3()
        for path in self.paths:
            places = [self.stored[name] for name in self.stored if self.holders[name] == path]
            with path.open("rb") as file:
                first = min((place.offset for place in places), default=0)
                digest.update(file.read(first))
                for place in sorted(places, key=lambda place: place.offset):
                    file.seek(place.offset)
                    digest.update(file.read(min(place.length, _DIGEST_BYTES)))
        return digest.hexdigest()


class TensorReader:
    """Reads tensors by their stored names, within ``CheckpointFiles.reader``."""

    def __init__(
        self, holders: Mapping[str, Path], device: str, stack: contextlib.ExitStack
    ) -> None:
        self._holders, self._device, self._stack = holders, device, stack
        self._open: dict[Path, Any] = {}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as it is stored."""
        path = self._holders[name]
        if path not in self._open:
            opened = safe_open(path, framework="pt", device=self._device)
            self._open[path] = self._stack.enter_context(opened)
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor


def open_files(path: Path) -> CheckpointFiles:
    """Read the headers of a safetensors file, or of all shards of a ``.safetensors.index.json``.

    Raises:
        UnknownCheckpointError: It is a file of another format.
        DamagedCheckpointError: A file is damaged or missing, or index and shards disagree.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        refuse_other_formats(path, path.name)
        return _collected(path, (path,), None)
    listed = read_index(path)
    shards = {name: path.parent / name for name in sorted(set(listed.values()))}
    for shard in shards.values():
        refuse_other_formats(shard, path.name)
    return _collected(path, tuple(shards.values()), listed)


def _collected(
    path: Path, paths: tuple[Path, ...], listed: Mapping[str, str] | None
) -> CheckpointFiles:
    stored: dict[str, StoredTensor] = {}
    holders: dict[str, Path] = {}
    metadata = []
    states = tuple(_state(shard) for shard in paths)
    for shard in paths:
        try:
            header = read_header(shard)
        except (SafetensorError, OSError) as error:
            subject = "it" if shard == path else f"its shard '{shard.name}'"
            reason = f"{subject} cannot be read as safetensors ({error})"
            raise DamagedCheckpointError(path.name, reason) from error
        metadata.append(header.metadata)
        for name, place in header.tensors.items():
            if name in holders:
                reason = f"'{holders[name].name}' and '{shard.name}' both hold '{name}'"
                raise DamagedCheckpointError(path.name, reason)
            stored[name], holders[name] = place, shard
    if listed is not None:
        _check_listing(path, listed, holders)
    return CheckpointFiles(path, paths, stored, holders, tuple(metadata), states)


def _check_listing(path: Path, listed: Mapping[str, str], holders: Mapping[str, Path]) -> None:
    for name, shard in listed.items():
        if name not in holders:
            reason = f"its shard '{shard}' does not hold '{name}', which the index expects there"
            raise DamagedCheckpointError(path.name, reason)
        if holders[name].name != shard:
            reason = f"the index expects '{name}' in '{shard}', but '{holders[name].name}' holds it"
            raise DamagedCheckpointError(path.name, reason)
    for name, holder in holders.items():
        if name not in listed:
            reason = f"its shard '{holder.name}' holds '{name}', which the index does not list"
            raise DamagedCheckpointError(path.name, reason)


def _state(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
    except OSError as error:
        reason = f"'{path.name}' is missing ({error.strerror})"
        raise DamagedCheckpointError(path.name, reason) from error
    return state.st_size, state.st_mtime_ns
