"""Writing a safetensors file whose tensors arrive one by one and whose header is known last.

``safetensors.save_file`` wants every tensor in memory. Here the layout is declared first, room
for the header is kept, each tensor is written to its place as it is made, and the header goes in
at the end, padded with spaces as the format allows. The file takes its name only when complete;
until then it and the journal beside it say which parts are done, so that work can go on after a
cancel or a crash.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from blake3 import blake3
from filelock import FileLock, Timeout
from torch import Tensor

from .content_digest import content_digest
from .errors.files import CheckpointBusyError, DiskFullError, FolderNotWritableError
from .journal import Journal
from .quantized_checkpoint import METADATA_KEY, QuantizedMetadata
from .safetensors_header import StoredTensor
from .whole_files import NO_SPACE, make_folder, storing, sync_folder

_DTYPES = {
    torch.float32: ("F32", 4),
    torch.bfloat16: ("BF16", 2),
    torch.float16: ("F16", 2),
    torch.float8_e4m3fn: ("F8_E4M3", 1),
    torch.uint8: ("U8", 1),
}
_ALIGNMENT = 8
"""safetensors aligns the end of its header to 8 bytes."""

_REPORT_BYTES = 400
"""Room for one report entry: its longest name and three numbers take under 250 bytes."""


logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes a quantized checkpoint atomically and resumably; a context manager.

    Leaving the context without ``finish`` keeps the parts that ``finish_part`` declared done, or
    removes everything if there are none.

    Attributes:
        finished: Note of each part that an earlier run with the same job finished.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], job: str
    ):
        """Lay the file out.

        Args:
            path: Final name; a file there is replaced by ``finish``, and only then.
            layout: dtype and shape of every tensor by name.
            job: Names what the bytes depend on; only the work of an equal job is taken up again.
        """
        self._path = path
        self._layout = dict(layout)
        # widest dtype first: every tensor starts at a multiple of its element size
        order = sorted(layout, key=lambda name: (-_DTYPES[layout[name][0]][1], name))
        self._offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for name in order:
            dtype, shape = layout[name]
            size = _DTYPES[dtype][1] * torch.Size(shape).numel()
            self._offsets[name] = (end, end + size)
            end += size
        room = len(self._header("")) + _REPORT_BYTES * (len(layout) + 16)
        self._data_start = 8 + room + -room % _ALIGNMENT
        self._total_bytes = self._data_start + end
        self._digests: dict[str, str] = {}
        self._job = blake3(repr((job, self._offsets, self._data_start)).encode()).hexdigest()
        self._partial, self._journal, self._lock = (
            _partial(path),
            Journal(_journal(path)),
            _lock(path),
        )
        self.finished: dict[str, Any] = {}

    def __enter__(self) -> CheckpointWriter:
        """Open the unfinished file beside the final one, or create it.

        Raises:
            DiskFullError: The disk has less room than the file needs.
            FolderNotWritableError, FileWriteError: The system refuses to write.
            CheckpointBusyError: Another process is writing this checkpoint.
        """
        make_folder(self._path.parent)
        with self._storing(), contextlib.ExitStack() as undo:
            try:
                self._lock.acquire()
            except Timeout as error:
                raise CheckpointBusyError(self._path.name) from error
            undo.callback(self._lock.release)
            self._resume_or_create()
            undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file; keep it for another run only if that would find finished parts."""
        with contextlib.suppress(OSError):
            self._file.close()
        if isinstance(error, DiskFullError) or not self.finished:
            with contextlib.suppress(OSError):
                self._remove_unfinished()
        self._lock.release()

    def check_disk(self) -> None:
        """Refuse to begin what the disk cannot hold.

        Raises:
            FolderNotWritableError: No file can be made in the folder.
            DiskFullError: It has less room than the file needs.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._path.parent):
                pass
        except OSError as error:
            if error.errno in NO_SPACE:
                raise DiskFullError(self._path.name, self._total_bytes, 0) from error
            raise FolderNotWritableError(self._path.parent.name, str(error)) from error
        free = shutil.disk_usage(self._path.parent).free
        if free < self._total_bytes:
            raise DiskFullError(self._path.name, self._total_bytes, free)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor to its place; dtype and shape must be those declared."""
        if (tensor.dtype, tuple(tensor.shape)) != self._layout[name]:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was not declared")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        with self._storing():
            self._file.seek(self._data_start + self._offsets[name][0])
            self._file.write(data.data)
        self._digests[name] = blake3(data.data).hexdigest()

    def finish_part(self, part: str, note: Any) -> None:
        """Declare everything added since the last part done, for good.

        Args:
            part: Its name.
            note: JSON value that a later run finds in ``finished``.
        """
        with self._storing():
            self._file.flush()
            os.fsync(self._file.fileno())
        known = {name for entry in self._journal.entries for name in entry["digests"]}
        digests = {name: self._digests[name] for name in self._digests if name not in known}
        with self._storing():
            self._journal.append({"part": part, "note": note, "digests": digests})
        self.finished[part] = note

    def read_block(self, block: str) -> dict[str, Tensor]:
        """Read what was added of a block, by names relative to it."""
        start = f"{block}."
        return {n.removeprefix(start): self._read(n) for n in self._digests if n.startswith(start)}

    @contextlib.contextmanager
    def scratch_folder(self) -> Iterator[Path]:
        """Make an empty folder beside the file, for as long as the context lasts.

        What a killed run left in it is deleted: this writer holds the file's lock.
        """
        folder = self._path.with_name(f".{self._path.stem}.scratch")
        shutil.rmtree(folder, ignore_errors=True)
        with self._storing():
            folder.mkdir()
        try:
            yield folder
        finally:
            # on Windows a mapped file stays until it is unmapped; the next run deletes it
            shutil.rmtree(folder, ignore_errors=True)

    def content_digest(self) -> str:
        """Return the digest over names and bytes of all tensors; all must be written."""
        missing = sorted(set(self._layout) - set(self._digests))
        if missing:
            raise ValueError(f"{len(missing)} tensors were never written, first: {missing[0]}")
        return content_digest(self._digests)

    def finish(self, metadata: QuantizedMetadata) -> None:
        """Write the header, flush to disk and give the file its name."""
        header = self._header(metadata.model_dump_json()).ljust(self._data_start - 8, b" ")
        if len(header) != self._data_start - 8:
            raise ValueError(f"header of {len(header)} bytes, room for {self._data_start - 8}")
        with self._storing():
            self._file.seek(0)
            self._file.write(struct.pack("<Q", len(header)) + header)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self._path)
            self.finished.clear()
            sync_folder(self._path.parent)

    def _read(self, name: str) -> Tensor:
        dtype, shape = self._layout[name]
        begin, end = self._offsets[name]
        with self._storing():
            self._file.seek(self._data_start + begin)
            data = bytearray(self._file.read(end - begin))
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)

    def _storing(self) -> contextlib.AbstractContextManager[None]:
        return storing(self._path, self._total_bytes)

    def _header(self, metadata: str) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt", METADATA_KEY: metadata}}
        for name, span in self._offsets.items():
            dtype, shape = self._layout[name]
            entries[name] = {
                "dtype": _DTYPES[dtype][0],
                "shape": list(shape),
                "data_offsets": list(span),
            }
        return json.dumps(entries, separators=(",", ":")).encode()

    def _resume_or_create(self) -> None:
        entries = self._journal.read(self._job)
        if entries and self._partial.is_file():
            self._file = self._partial.open("r+b")
            for entry in entries:
                if not self._holds(entry["digests"]):
                    break
                self._digests |= entry["digests"]
                self.finished[entry["part"]] = entry["note"]
            self._journal.entries = entries[: len(self.finished)]
            logger.info("Found %d finished parts of %s", len(self.finished), self._path.name)
            return
        self._remove_unfinished()
        self.check_disk()
        self._file = self._partial.open("x+b")
        try:
            self._journal.start(self._job)
        except OSError:
            self._file.close()
            self._remove_unfinished()
            raise

    def _holds(self, digests: Mapping[str, str]) -> bool:
        for name, digest in digests.items():
            begin, end = self._offsets[name]
            self._file.seek(self._data_start + begin)
            if blake3(self._file.read(end - begin)).hexdigest() != digest:
                return False
        return True

    def _remove_unfinished(self) -> None:
        self._partial.unlink(missing_ok=True)
        self._journal.remove()


def stored_layout(
    tensors: Mapping[str, StoredTensor],
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the layout of a finished file, to write another one like it."""
    dtypes = {code: dtype for dtype, (code, _) in _DTYPES.items()}
    return {name: (dtypes[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def remove_leftovers(path: Path) -> None:
    """Delete what a run that was killed left beside a finished checkpoint.

    A kill between the last two steps, naming the file and deleting its journal, leaves the journal.

    Args:
        path: The checkpoint, which no run will write again.
    """
    leftovers = [p for p in (_partial(path), _journal(path)) if p.exists()]
    if not leftovers:
        return
    # Timeout: a process is writing this checkpoint anew, and these are its files
    with contextlib.suppress(OSError), _lock(path):
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.partial")


def _journal(path: Path) -> Path:
    return path.with_name(f".{path.stem}.journal")


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.stem}.lock"), timeout=0)
