"""Runs blocks on the CPU with ONNX Runtime: slow, but it is the exported ONNX that runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .adapters import FactorStore, factor_inputs
from .errors.run import EngineNotLoadedError
from .reference_graph import reference_model
from .selection import Selection
from .signature import BlockSignature, read_block_folder
from .variant_plans import form_signature

if TYPE_CHECKING:
    import onnxruntime

    Session = tuple[Path, onnxruntime.InferenceSession]
    """With the file it was made from."""

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
        self._folder = folder
        self._signatures = {s.block: s for s in read_block_folder(folder)}
        self._used = dict(self._signatures)
        self._factors = FactorStore()
        self._sessions: dict[str, Session] = {}

    @property
    def loaded(self) -> bool:
        """Whether run() can be called."""
        return bool(self._sessions)

    @property
    def weight_bytes(self) -> int:
        """Main memory that weights and factors take."""
        packed = sum(used.weight_bytes for used in self._used.values())
        return BYTES_PER_PACKED_BYTE * packed + self._factors.bytes

    def bytes_within(self, limit: int | None) -> int:
        """Return the same for every limit."""
        del limit
        return self.weight_bytes

    def limit(self, weight_bytes: int | None) -> None:
        """Do nothing: limits are for GPUs, and weights are in main memory here."""
        del weight_bytes

    @property
    def activation_bytes(self) -> int:
        """Unknown: ONNX Runtime allocates and frees as it goes."""
        return 0

    def load(self, device: torch.device) -> None:
        """Create a session per block; `device` is where inputs come from and does not matter."""
        del device
        if self._sessions:
            return
        self._create_sessions()

    def unload(self) -> None:
        """Free all sessions."""
        self._sessions = {}
        self._factors.release()

    @property
    def machine(self) -> None:
        """No machine to test: this is what tests compare with."""
        return None

    def use(self, selection: Selection) -> None:
        """Run what is selected from the next run on; what does not change stays loaded.

        Raises:
            BlocksMissingError: A form was not exported; nothing has changed.
            EngineStaleError: A form is of another checkpoint; nothing has changed.
            AdapterError: Factors do not fit; nothing has changed.
        """
        used = {block: self._form(block, selection) for block in self._signatures}
        inputs = {
            block: factor_inputs(block, used[block].inputs, linears)
            for block, linears in selection.adapters.items()
        }
        self._factors.replace(inputs, torch.float32)
        self._used = used
        if self._sessions:
            self._create_sessions()

    def run(self, block: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run one block in fp32 on the CPU; results are fp32 on the inputs' device."""
        _, session = self._sessions.get(block, (None, None))
        if session is None:
            raise EngineNotLoadedError(block)
        device = next(iter(inputs.values())).device
        feed = {
            name: tensor.detach().to("cpu", torch.float32).contiguous().numpy()
            for name, tensor in (*inputs.items(), *self._factors.inputs_of(block).items())
        }
        names = [output.name for output in session.get_outputs()]
        results = session.run(names, feed)
        return {
            name: torch.from_numpy(result).to(device)
            for name, result in zip(names, results, strict=True)
        }

    def _create_sessions(self) -> None:
        """Load what shall run and is not loaded."""
        for block, signature in self._used.items():
            path, _ = self._sessions.get(block, (None, None))
            if path != signature.path:
                # the old one goes first
                self._sessions.pop(block, None)
                self._sessions[block] = (signature.path, session_from_onnx(signature.path))
        self._factors.place(torch.device("cpu"))

    def _form(self, block: str, selection: Selection) -> BlockSignature:
        name, folder = selection.name_of(block), self._folder
        if selection.baked is not None and selection.is_baked(block):
            folder = selection.baked.folder
        elif name == block:
            return self._signatures[block]
        return form_signature(folder, name, self._signatures[block].checkpoint_digest)


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
