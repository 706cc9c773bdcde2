"""What the executor needs of CUDA, in one replaceable object."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from .backend import probe_gpu
from .errors.backend import BackendUnusableError, EngineTargetError


class CudaAccess:
    """Device checks and stream order through torch."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def prepare(self, device: torch.device, backend: str, targets: Sequence[str]) -> None:
        """Check that plans for `targets` run on `device`; create the stream and make room.

        Raises:
            BackendUnusableError: it is not a CUDA device.
            EngineTargetError: it is another GPU generation.
        """
        gpu = probe_gpu(device)
        if gpu.problem:
            raise BackendUnusableError(backend, gpu.problem)
        if gpu.sm not in targets:
            raise EngineTargetError(gpu.name, gpu.sm, targets)
        # TensorRT allocates weights beside torch's caching allocator
        torch.cuda.empty_cache()
        self._stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def activated(self, device: torch.device) -> Iterator[None]:
        """Make `device` current for native code that allocates on the current device."""
        with torch.cuda.device(device):
            yield

    @contextlib.contextmanager
    def ordered_stream(self, device: torch.device) -> Iterator[int]:
        """Yield a stream that runs after torch's current stream, which in turn waits for it.

        TensorRT synchronizes the device on the default stream, which is the one ComfyUI uses; on a
        stream of its own the CPU runs ahead. Because the current stream waits, memory that torch
        frees afterwards is not reused before the engine has finished with it, so no tensor needs
        record_stream().
        """
        assert self._stream is not None, "prepare() comes first"
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.device(device):
                yield self._stream.cuda_stream
        finally:
            current.wait_stream(self._stream)

    def synchronize(self) -> None:
        """Wait until nothing runs on the engine's stream."""
        if self._stream is not None:
            self._stream.synchronize()

    def finish(self) -> None:
        """Wait until nothing runs on the engine's stream, and give it up."""
        self.synchronize()
        self._stream = None
