"""Errors about files that are written, and about the quantized checkpoint itself."""

from __future__ import annotations

from . import QuantError, shortened


class QuantizedCheckpointError(QuantError):
    """A file in the FP4 model folder is not a quantized checkpoint of this version.

    Attributes:
        name: File name.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, shortened(reason)
        super().__init__(
            f"'{name}' is not a usable FP4 checkpoint: {self.reason}. "
            "Make it again with 'Quantize FLUX to FP4'."
        )


class CheckpointBusyError(QuantError):
    """Another process is writing the same quantized checkpoint.

    Attributes:
        name: File that is being written.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"'{name}' is being written by another process right now. "
            "Wait until that is done and queue again, or enter another name."
        )


class DiskFullError(QuantError):
    """The disk cannot hold the file to be written.

    Attributes:
        name: File that was being written.
        needed_bytes: Size of the whole file; 0 where it is not known.
        free_bytes: What the disk has left.
    """

    def __init__(self, name: str, needed_bytes: int, free_bytes: int) -> None:
        self.name, self.needed_bytes, self.free_bytes = name, needed_bytes, free_bytes
        needs = f"needs {size_text(needed_bytes)}, but" if needed_bytes else "does not fit:"
        # a quota or a limit of the file system refuses long before the disk is full
        super().__init__(
            f"'{name}' {needs} its disk takes no more ({size_text(free_bytes)} free). Nothing was "
            "changed; free some space and queue again."
        )


class FileWriteError(QuantError):
    """The system refused to write a file for another reason than a full disk.

    Attributes:
        name: The file.
        folder: Name of its folder.
        reason: What the system says.
    """

    def __init__(self, name: str, folder: str, reason: str) -> None:
        self.name, self.folder, self.reason = name, folder, reason
        super().__init__(
            f"'{name}' cannot be written into the folder '{folder}': {reason}. Check that ComfyUI "
            "may write there and that the disk is in order, then queue again; what is finished is "
            "kept."
        )


class FolderNotWritableError(QuantError):
    """No file can be made in the folder of a quantized checkpoint.

    Attributes:
        folder: Name of the folder.
        reason: What the system says.
    """

    def __init__(self, folder: str, reason: str) -> None:
        self.folder, self.reason = folder, reason
        super().__init__(
            f"The folder '{folder}' cannot be written to: {reason}. Nothing was changed; allow "
            "ComfyUI to write there, or add another 'flux_fp4' folder to extra_model_paths.yaml."
        )


def size_text(size: int) -> str:
    """Return a size in bytes as a person reads it."""
    if size >= 10**9:
        return f"{size / 1e9:,.1f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 10**6 else f"{size / 1e3:.1f} kB"
