"""Runs blocks on the CPU with ONNX Runtime: slow, but it is the exported ONNX that runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from .adapters import FactorStore, factor_inputs
from .errors.run import EngineNotLoadedError
from .reference_session import BlockSession
from .reference_weights import Scratch
from .resources import free_memory
from .selection import Selection
from .signature import BlockSignature, read_block_folder
from .variant_plans import form_signature

KEPT_SHARE = 4
"""One part in so many of the free memory holds matrices in fp32, eight times what FP4 takes. The
blocks that come first are kept so: all of a small model, of FLUX.1-dev one for each 0.5 to 0.9 GB.
The others are dequantized in every run, a tenth to a fifth of its time."""


class ReferenceExecutor:
    """Executes the blocks' ONNX files in fp32, with FP4 and FP8 rounded where the graph says.

    Args:
        folder: Holds the blocks' ONNX files; each is checked before ONNX Runtime sees it.
        kept_bytes: How much memory matrices may take in fp32 between runs; None: a part of what
            is free now.
    """

    def __init__(self, folder: Path, kept_bytes: int | None = None) -> None:
        self._folder = folder
        self._signatures = {s.block: s for s in read_block_folder(folder)}
        self._used = dict(self._signatures)
        self._factors = FactorStore()
        self._sessions: dict[str, BlockSession] = {}
        if kept_bytes is None:
            kept_bytes = free_memory().free // KEPT_SHARE
        self._kept = blocks_to_keep(self._signatures.values(), kept_bytes)
        self._scratch = Scratch()

    @property
    def loaded(self) -> bool:
        """Whether run() can be called."""
        return bool(self._sessions)

    @property
    def weight_bytes(self) -> int:
        """Main memory that weights and factors take, with the place to dequantize a block in."""
        kept = sum(fp32_bytes(self._used[block]) for block in self._kept)
        others = [used for block, used in self._used.items() if block not in self._kept]
        stored = sum(used.weight_bytes for used in others)
        scratch = max((fp32_bytes(used) for used in others), default=0)
        return kept + stored + scratch + self._factors.bytes

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
        self._scratch.release()
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
        session = self._sessions.get(block)
        if session is None:
            raise EngineNotLoadedError(block)
        device = next(iter(inputs.values())).device
        feed = {
            name: tensor.detach().to("cpu", torch.float32).contiguous().numpy()
            for name, tensor in (*inputs.items(), *self._factors.inputs_of(block).items())
        }
        results = session.run(session.output_names, feed)
        return {
            name: torch.from_numpy(result).to(device)
            for name, result in zip(session.output_names, results, strict=True)
        }

    def _create_sessions(self) -> None:
        """Load what shall run and is not loaded."""
        for block, signature in self._used.items():
            if block in self._sessions and self._sessions[block].path == signature.path:
                continue
            # the old one goes first
            self._sessions.pop(block, None)
            scratch = None if block in self._kept else self._scratch
            self._sessions[block] = BlockSession(signature.path, scratch)
        self._factors.place(torch.device("cpu"))

    def _form(self, block: str, selection: Selection) -> BlockSignature:
        name, folder = selection.name_of(block), self._folder
        if selection.baked is not None and selection.is_baked(block):
            folder = selection.baked.folder
        elif name == block:
            return self._signatures[block]
        return form_signature(folder, name, self._signatures[block].checkpoint_digest)


def blocks_to_keep(signatures: Iterable[BlockSignature], limit: int) -> frozenset[str]:
    """Return the first blocks whose matrices in fp32 fit into ``limit`` bytes together."""
    kept = set()
    for signature in signatures:
        limit -= fp32_bytes(signature)
        if limit < 0:
            break
        kept.add(signature.block)
    return frozenset(kept)


def fp32_bytes(signature: BlockSignature) -> int:
    """Return the size of a block's weights once they are fp32."""
    growth = {f"{linear}.weight": 8 for linear in signature.fp4_linears}
    # block scales are multiplied in
    growth |= {f"{linear}.weight_scale": 0 for linear in signature.fp4_linears}
    growth |= {f"{linear}.weight": 4 for linear in signature.fp8_linears}
    others = 1 if signature.high_precision == "fp32" else 2
    return sum(growth.get(entry.name, others) * entry.length for entry in signature.ranges)
