"""Runs blocks on the CPU with ONNX Runtime: slow, but it is the exported ONNX that runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .errors import EngineNotLoadedError
from .reference_graph import reference_model
from .signature import read_block_folder

if TYPE_CHECKING:
    import onnxruntime

MAX_THREADS = 16
"""Beyond this, blocks of FLUX size gain nothing on a desktop CPU and take threads from ComfyUI."""


BYTES_PER_PACKED_BYTE = 4
"""An FP4 value takes a byte as E4M3, and ONNX Runtime 1.32 holds initializers twice: a block of
64 MB takes 234 MB, one of 127 MB takes 478 MB."""


class ReferenceExecutor:
    """Executes the blocks' ONNX files in fp32, with FP4 and FP8 rounded where the graph says.

    Args:
        folder: Holds the blocks' ONNX files; each is checked before ONNX Runtime sees it.
    """

    def __init__(self, folder: Path) -> None:
        self._signatures = read_block_folder(folder)
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    @property
    def loaded(self) -> bool:
        """Whether run() can be called."""
        return bool(self._sessions)

    @property
    def weight_bytes(self) -> int:
        """Main memory that the weights take."""
        packed = sum(entry.length for block in self._signatures for entry in block.ranges)
        return BYTES_PER_PACKED_BYTE * packed

    def load(self, device: torch.device) -> None:
        """Create a session per block; `device` is where inputs come from and does not matter."""
        del device
        if self._sessions:
            return
        self._sessions = {
            signature.block: session_from_onnx(signature.path) for signature in self._signatures
        }

    def unload(self) -> None:
        """Free all sessions."""
        self._sessions = {}

    def run(self, block: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run one block in fp32 on the CPU; results are fp32 on the inputs' device."""
        session = self._sessions.get(block)
        if session is None:
            raise EngineNotLoadedError(block)
        device = next(iter(inputs.values())).device
        feed = {
            name: tensor.detach().to("cpu", torch.float32).contiguous().numpy()
            for name, tensor in inputs.items()
        }
        names = [output.name for output in session.get_outputs()]
        results = session.run(names, feed)
        return {
            name: torch.from_numpy(result).to(device)
            for name, result in zip(names, results, strict=True)
        }


def session_from_onnx(path: Path) -> onnxruntime.InferenceSession:
    """Return a CPU session for a block file whose weights stay quantized in memory."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = min(os.cpu_count() or 1, MAX_THREADS)
    # Many sessions, one running: idle threads must not spin, and activations must not stay
    # allocated.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False
    # The graph runs as written: ONNX Runtime 1.23, the last for Python 3.10, otherwise moves FP8
    # DequantizeLinear nodes about and turns their partners into uint8 ones.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        reference_model(path).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
