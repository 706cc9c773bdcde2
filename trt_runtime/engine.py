"""An engine: the blocks of one checkpoint, ready to run on the backend that this machine has."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from .backend import BackendChoice, choose_backend, probe_gpu
from .block_call import AcceptedCall, accepted_call, batch_parts
from .contract import MASK, MASK_SHAPE, TensorSpec
from .errors.backend import BackendUnusableError
from .errors.run import BlockInputError
from .in_use import InUseMark
from .last_use import mark_used
from .manifest import EngineManifest, PlanEntry, load_manifest, verify_engine
from .selection import Selection
from .self_test import Machine, SelfTest

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """What runs the blocks: TensorRT or the reference."""

    @property
    def loaded(self) -> bool:
        """Whether run() can be called."""

    @property
    def weight_bytes(self) -> int:
        """Memory that weights and factors take once loaded."""

    @property
    def activation_bytes(self) -> int:
        """Scratch memory of the largest block at the profile's maximum; 0 if unknown."""

    @property
    def machine(self) -> Machine | None:
        """What loaded blocks run on; None for the reference, which needs no test."""

    def bytes_within(self, limit: int | None) -> int:
        """Return the memory that weights and factors take under a limit."""

    def limit(self, weight_bytes: int | None) -> None:
        """Set how much GPU memory weights and factors may take, loaded or not."""

    def use(self, selection: Selection) -> None:
        """Run what is selected, loaded or not."""

    def load(self, device: torch.device) -> None:
        """Make all blocks ready to run."""

    def unload(self) -> None:
        """Free everything that load() and run() allocated."""

    def run(self, block: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run one block on inputs that fit its signature and the profile."""


class Engine:
    """Runs blocks by name; open it with Engine.open()."""

    def __init__(
        self,
        folder: Path,
        manifest: EngineManifest,
        executor: Executor,
        backend_name: str,
        backend_reason: str,
        self_test: SelfTest | None = None,
        mark: InUseMark | None = None,
    ) -> None:
        self.manifest = manifest
        self.folder = folder
        self.backend_name = backend_name
        self.backend_reason = backend_reason
        self._executor = executor
        self._self_test = self_test
        # as long as the engine can be loaded again, nobody may delete it
        self._mark = mark
        self._bake_mark: InUseMark | None = None
        self._selection = Selection()
        self._limit: int | None = None
        self._entries = {entry.block: entry for entry in manifest.blocks}
        self._calls: dict[str, AcceptedCall] = {}

    @classmethod
    def open(
        cls,
        engine_dir: Path,
        backend: str = "auto",
        device: torch.device | None = None,
        cuda_graphs: bool = False,
    ) -> Engine:
        """Check an engine folder and choose the backend; nothing is loaded yet.

        The folder is marked as in use until the engine is forgotten.

        Args:
            engine_dir: Folder with manifest.json.
            backend: "auto", "reference", or the library that the plans are for.
            device: Where the engine will be loaded; None is torch's current CUDA device.
            cuda_graphs: Launch each block as one CUDA graph; the reference has nothing to launch.

        Raises:
            EngineError: the engine is missing, unfinished, changed, stale, or not for this machine.
        """
        manifest = load_manifest(engine_dir)
        choice = choose_backend(backend, manifest.backend, manifest.targets, probe_gpu(device))
        with contextlib.ExitStack() as failing:
            # marked before it is checked: what is checked stays
            mark = InUseMark(engine_dir)
            failing.callback(mark.release)
            verify_engine(engine_dir, manifest, choice.backend)
            executor = cls._executor_of(engine_dir, manifest, choice, cuda_graphs)
            failing.pop_all()
        self_test = SelfTest(engine_dir, manifest)
        return cls(engine_dir, manifest, executor, choice.name, choice.reason, self_test, mark)

    @staticmethod
    def _executor_of(
        engine_dir: Path, manifest: EngineManifest, choice: BackendChoice, cuda_graphs: bool
    ) -> Executor:
        if choice.reason:
            logger.info("FLUX FP4 runs on the reference backend (CPU): %s", choice.reason)
        if choice.backend is None:
            from .reference import ReferenceExecutor

            return ReferenceExecutor(engine_dir.parent)
        from .executor import TensorRTExecutor

        if cuda_graphs and not choice.backend.has_cuda_graphs:
            raise BackendUnusableError(choice.name, "it has no CUDA graphs of its own")
        return TensorRTExecutor(engine_dir, manifest, choice.backend, cuda_graphs=cuda_graphs)

    @property
    def loaded(self) -> bool:
        """Whether run() can be called."""
        return self._executor.loaded

    @property
    def weight_bytes(self) -> int:
        """Bytes that the blocks' weights take once loaded."""
        return self._executor.weight_bytes

    @property
    def resident_bytes(self) -> int:
        """Bytes that are taken now."""
        return self.bytes_within(self._limit) if self.loaded else 0

    def bytes_within(self, limit: int | None) -> int:
        """Return the bytes that weights take under a limit; None is no limit."""
        return self._executor.bytes_within(limit)

    def limit(self, weight_bytes: int | None) -> None:
        """Keep weights on the GPU within a limit; plans beyond it are loaded when they run.

        One place is always reserved for the largest plan. The reference backend has its weights in
        main memory and knows no limit.
        """
        self._executor.limit(weight_bytes)
        self._limit = weight_bytes

    def activation_bytes(self, batch: int, img_tokens: int, txt_tokens: int) -> int:
        """Estimate the scratch memory of a run; only one block runs at a time.

        The builder reports the size at the profile's maximum, and it grows linearly with the number
        of tokens (measured with TensorRT-RTX 1.7 for 4,096 to 16,384 tokens).
        """
        profile = self.manifest.profile
        largest = max((entry.activation_bytes for entry in self.manifest.blocks), default=0)
        largest = max(largest, self._executor.activation_bytes)
        tokens = min(batch, profile.max_batch) * (img_tokens + txt_tokens)
        return math.ceil(largest * tokens / (profile.max_batch * profile.range("S").maximum))

    def load(self, device: torch.device) -> None:
        """Make all blocks ready to run; does nothing when they are.

        The first time on a GPU, driver and library the engine is tested against the reference. The
        folder remembers when it was loaded last.

        Raises:
            SelfTestError: It computes something else; it is not loaded then.
        """
        if self._executor.loaded:
            return
        self._executor.load(device)
        mark_used(self.folder)
        test, machine = self._self_test, self._executor.machine
        if test is None or machine is None or test.has_passed(machine):
            return
        complete = False
        try:
            # plain blocks are what the reference runs
            wanted = self._selection
            self.use(Selection())
            test.run(machine, self.run)
            self.use(wanted)
            complete = True
        finally:
            if not complete:
                self._executor.unload()

    def unload(self) -> None:
        """Free weights, contexts and buffers; load() brings them back."""
        self._executor.unload()

    @property
    def selection(self) -> Selection:
        """What runs."""
        return self._selection

    def use(self, selection: Selection) -> None:
        """Run other forms of blocks from the next run on.

        ``use(Selection())`` gives the results of a fresh engine, bit for bit.

        Raises:
            BlockInputError: The engine has no such block; nothing has changed.
            BlocksMissingError: A block was not exported in this form; nothing has changed.
            VariantPlanMissingError: `variant_plans.build_selected` must build forms of blocks
                first; nothing has changed.
            EngineStaleError: A form is of another checkpoint; nothing has changed.
            AdapterError: Factors do not fit; nothing has changed.
        """
        for block in (*selection.adapters, *(selection.baked.blocks if selection.baked else ())):
            self._entry(block)
        with contextlib.ExitStack() as failing:
            mark = InUseMark(selection.baked.folder) if selection.baked else None
            if mark is not None:
                failing.callback(mark.release)
            self._executor.use(selection)
            failing.pop_all()
        self._selection, former, self._bake_mark = selection, self._bake_mark, mark
        if former is not None:
            former.release()
        self._entries = {
            entry.block: _with_mask(entry, self.manifest.high_precision)
            if selection.masked
            else entry
            for entry in self.manifest.blocks
        }
        self._calls = {}

    def run(self, block: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run one block.

        A batch above the profile's maximum is run in parts. Inputs of batch 1 serve the whole
        batch.

        Args:
            block: Such as "double_blocks.0".
            inputs: Every input of the block's signature, and ``mask [B, 1, S, S]`` if the selection
                is masked; floating types are converted.

        Returns:
            The outputs by name, in the type of the first input (img or x) and on its device.

        Raises:
            BlockInputError: a name, rank, size or type does not match the signature.
            ShapeProfileError: more or fewer tokens than the engine was built for.
        """
        shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in inputs.items()]
        call = self._calls.get(block)
        if call is None or call.shapes != shapes:
            profile = self.manifest.profile
            call = accepted_call(self._entry(block), profile, inputs, shapes)
            self._calls[block] = call
        if call.as_given:
            outputs = self._executor.run(block, inputs)
        else:
            results = [
                self._executor.run(block, part)
                for part in batch_parts(call.entry, inputs, call.batch, call.parts)
            ]
            outputs = {name: torch.cat([part[name] for part in results]) for name in results[0]}
        dtype = inputs[call.entry.inputs[0].name].dtype
        return {
            name: value if value.dtype is dtype else value.to(dtype)
            for name, value in outputs.items()
        }

    def _entry(self, block: str) -> PlanEntry:
        entry = self._entries.get(block)
        if entry is None:
            raise BlockInputError(block, f"the engine has {len(self._entries)} other blocks")
        return entry


def _with_mask(entry: PlanEntry, dtype: str) -> PlanEntry:
    mask = TensorSpec(MASK, dtype, MASK_SHAPE)
    return entry.model_copy(update={"inputs": (*entry.inputs, mask)})
