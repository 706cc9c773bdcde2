"""One block in ONNX Runtime on the CPU, as ``reference_graph`` rewrites it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .reference_graph import reference_model
from .reference_weights import BlockMatrices, Scratch
from .resources import usable_cores

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime

MAX_THREADS = 16
"""Beyond this, blocks of FLUX size gain nothing on a desktop CPU and take threads from ComfyUI."""


class BlockSession:
    """A block that can run, with its matrices.

    Args:
        path: A block file that has been checked.
        scratch: Where to dequantize the matrices for every run; None keeps them in fp32.
    """

    def __init__(self, path: Path, scratch: Scratch | None = None) -> None:
        import onnxruntime

        self.path = path
        model, matrices = reference_model(path)
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
        )
        del model
        self._matrices = BlockMatrices(matrices, scratch)
        self._run_options = onnxruntime.RunOptions()
        # Nodes use what other nodes have used before, and all is given back after the run. From the
        # system anew for every node, memory took as long as the arithmetic on it.
        self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self.output_names = [output.name for output in self._session.get_outputs()]

    def run(
        self, outputs: Sequence[str] | None, inputs: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        """Compute outputs, or all of them, in fp32."""
        feed = {**inputs, **self._matrices.arrays()}
        results: list[np.ndarray] = self._session.run(outputs, feed, self._run_options)
        return results


def session_options() -> onnxruntime.SessionOptions:
    """Return how a block's graph is run.

    ONNX Runtime may optimize it: no FP8 is left, whose nodes 1.23, the last for Python 3.10, moved
    about. It multiplies by matrices as they lie, ``[N, K]``, and never transposes them.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = min(usable_cores(), MAX_THREADS)
    # many sessions, one running: idle threads must not spin
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
