"""Runs plans with TensorRT or TensorRT-RTX on torch tensors, in memory that torch allocates."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .adapters import FactorStore, factor_inputs
from .backend import Backend, RuntimeLog, runtime_log
from .cuda_access import CudaAccess
from .driver import driver_version
from .errors.engine import VariantPlanMissingError
from .errors.run import EngineNotLoadedError, ExecutionError
from .manifest import EngineManifest, PlanEntry, check_plan
from .part_times import PartTimes
from .plan_checks import check_signature, check_validity
from .plan_context import TORCH_DTYPES, PlanContext, ScratchMemory, Shapes
from .plan_pool import PlanPool, bytes_within
from .runtime_cache import RuntimeCache, cache_name
from .selection import Selection
from .self_test import Machine
from .variant_plans import selected_plans

logger = logging.getLogger(__name__)


class TensorRTExecutor:
    """Holds all plans of an engine on one GPU.

    Args:
        engine_dir: Folder of the plans.
        manifest: The verified manifest.
        backend: The library.
        cuda: Device and streams.
        cuda_graphs: Whether the library launches each block as a CUDA graph.
    """

    def __init__(
        self,
        engine_dir: Path,
        manifest: EngineManifest,
        backend: Backend,
        cuda: CudaAccess | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        self._engine_dir, self._manifest, self._backend = engine_dir, manifest, backend
        self._cuda, self._cuda_graphs = cuda or CudaAccess(), cuda_graphs
        self._log: RuntimeLog = runtime_log(backend)
        self._runtime: Any = None
        self._pool = PlanPool(self._opened, self._cuda.synchronize)
        self._limit: int | None = None
        self._checked: dict[str, mmap.mmap] = {}
        self._seen: dict[str, set[Shapes]] = {}
        self._selected = selected_plans(engine_dir, manifest, Selection())
        self._factors = FactorStore()
        self._scratch: ScratchMemory | None = None
        self._cache: RuntimeCache | None = None
        self._has_new_kernels = False
        self._device = torch.device("cpu")
        self._times = PartTimes()

    @property
    def loaded(self) -> bool:
        """Whether run() can be called."""
        return self._runtime is not None

    @property
    def weight_bytes(self) -> int:
        """GPU memory of weights and factors: a plan is its weights and a few hundred kilobytes."""
        return sum(plan.entry.bytes for plan in self._selected.values()) + self._factors.bytes

    def bytes_within(self, limit: int | None) -> int:
        """Return the GPU memory that weights and factors take under a limit."""
        sizes = {block: plan.entry.bytes for block, plan in self._selected.items()}
        return bytes_within(sizes, self._for_plans(limit)) + self._factors.bytes

    @property
    def activation_bytes(self) -> int:
        """Scratch memory of the largest block at the profile's maximum."""
        plans = self._selected.values()
        return max((plan.entry.activation_bytes for plan in plans), default=0)

    @property
    def scratch_bytes(self) -> int:
        """GPU memory of the activations at the moment."""
        return self._scratch.size_bytes if self._scratch else 0

    def load(self, device: torch.device) -> None:
        """Deserialize every plan on `device` and create its context; does nothing when loaded.

        Raises:
            EngineError: another GPU generation, a changed plan, or a plan that TensorRT refuses;
                nothing stays loaded then.
        """
        if self.loaded:
            return
        self._cuda.prepare(device, self._backend.name, self._manifest.targets)
        self._device = device
        self._times = PartTimes()
        complete = False
        try:
            with self._cuda.activated(device):
                with self._times.part("library"):
                    self._start()
                count = self._settle()
            complete = True
        finally:
            if not complete:
                self._release()
        logger.info("Loaded %d plans in %s", count, self._times)

    def limit(self, weight_bytes: int | None) -> None:
        """Keep weights and factors within this many bytes, or all of them; loaded or not.

        What does not fit is loaded when its turn comes, and waits for the GPU each time. The
        largest plan is always kept room for.

        Raises:
            EngineError: A plan could not be loaded; nothing stays loaded then.
        """
        if weight_bytes != self._limit:
            self._limit = weight_bytes
            self._settle_if_loaded()

    def unload(self) -> None:
        """Wait for the GPU, keep compiled kernels, and free plans, contexts and scratch memory."""
        if not self.loaded:
            return
        self._cuda.finish()
        if self._has_new_kernels:
            self._save_kernels()
        self._release()

    @property
    def machine(self) -> Machine | None:
        """What loaded plans run on."""
        return self._machine() if self.loaded else None

    def use(self, selection: Selection) -> None:
        """Run what is selected from the next run on; what does not change stays loaded.

        Raises:
            VariantPlanMissingError: A form was not built; nothing has changed.
            AdapterError: Factors do not fit; nothing has changed.
            EngineError: A plan could not be loaded; nothing stays loaded then.
        """
        found = selected_plans(self._engine_dir, self._manifest, selection)
        blocks = self._manifest.expected_blocks
        missing = [selection.name_of(block) for block in blocks if block not in found]
        if missing:
            raise VariantPlanMissingError(missing)
        inputs = {
            block: factor_inputs(block, found[block].entry.inputs, linears)
            for block, linears in selection.adapters.items()
        }
        self._factors.replace(inputs, TORCH_DTYPES[self._manifest.high_precision])
        self._selected = found
        self._settle_if_loaded()

    def run(self, block: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Enqueue one block; the results are valid on torch's current stream.

        Raises:
            EngineNotLoadedError: load() was not called.
            ExecutionError: TensorRT refused shapes or launch.
        """
        loaded = self._pool.present(block) or self._take_turn(block)
        if loaded is None or self._scratch is None:
            raise EngineNotLoadedError(block)
        # alive until the end of this call, by when the current stream waits for the engine's
        tensors = loaded.converted(inputs)
        if self._has_new_kernels and loaded.has_seen(tensors):
            self._save_kernels()
        if loaded.set_shapes(tensors):
            self._has_new_kernels = True
        loaded.set_scratch(self._scratch)
        outputs = loaded.bind(tensors)
        with self._cuda.ordered_stream(self._device) as stream:
            loaded.execute(stream)
        return outputs

    def _start(self) -> None:
        self._log.take_errors()
        self._runtime = self._backend.module.Runtime(self._log.interface)
        if self._backend.has_runtime_cache:
            machine = self._machine()
            owner = f"{machine.library} on {machine.gpu}, driver {machine.driver}"
            self._cache = RuntimeCache(self._engine_dir / cache_name(owner), owner)
        self._scratch = ScratchMemory(self._device)

    def _settle_if_loaded(self) -> None:
        if not self.loaded:
            return
        complete = False
        try:
            with self._cuda.activated(self._device):
                # plans and factors that go may still be in use
                self._cuda.synchronize()
                self._settle()
            complete = True
        finally:
            if not complete:
                self._release()

    def _settle(self) -> int:
        """Have on the GPU what shall be there, and nothing else; return how many were loaded."""
        entries = {block: plan.entry for block, plan in self._selected.items()}
        self._pool.set_plans(entries, self._for_plans(self._limit))
        loaded = self._pool.settle()
        # an open file cannot be replaced on Windows; plans that take turns are mapped again
        self._checked.clear()
        self._factors.place(self._device)
        for block, context in self._pool.contexts():
            context.set_factors(self._factors.inputs_of(block))
        if loaded:
            with self._times.part("kernel cache"):
                self._save_kernels()
        return len(loaded)

    def _for_plans(self, limit: int | None) -> int | None:
        return None if limit is None else limit - self._factors.bytes

    def _take_turn(self, block: str) -> PlanContext | None:
        if not self.loaded:
            return None
        with self._cuda.activated(self._device):
            context = self._pool.take_turn(block)
        if context is not None:
            context.set_factors(self._factors.inputs_of(block))
        return context

    def _opened(self, entry: PlanEntry) -> PlanContext:
        with self._times.part("digests"):
            plan = self._plan(entry)
        with self._times.part("deserialization"):
            check_validity(self._backend.module, self._runtime, entry, plan)
            engine = self._runtime.deserialize_cuda_engine(plan)
        self._require(engine is not None, entry.block, "deserialize_cuda_engine")
        check_signature(self._backend.module, entry, engine)
        with self._times.part("contexts"):
            context = self._context(engine)
        self._require(context is not None, entry.block, "create_execution_context")
        seen = self._seen.setdefault(entry.key, set())
        return PlanContext(entry, engine, context, self._device, self._require, seen)

    def _plan(self, entry: PlanEntry) -> mmap.mmap:
        """Map a plan; its digest is computed the first time only, a step must not wait for it."""
        if entry.key not in self._checked:
            folders = {plan.entry.key: plan.folder for plan in self._selected.values()}
            self._checked[entry.key] = check_plan(folders[entry.key], entry)
        return self._checked[entry.key]

    def _machine(self) -> Machine:
        is_cuda = self._device.type == "cuda"
        gpu = torch.cuda.get_device_name(self._device) if is_cuda else str(self._device)
        return Machine(gpu, driver_version(), self._backend.label)

    def _context(self, engine: Any) -> Any:
        strategy = self._backend.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cache is None:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        self._cache.attach(config)
        if self._cuda_graphs:
            graphs = self._backend.module.CudaGraphStrategy
            config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE
        return engine.create_execution_context(config)

    def _save_kernels(self) -> None:
        """Store what was compiled: after loading, when shapes repeat, and before unloading."""
        self._has_new_kernels = False
        if self._cache is not None:
            self._cache.save()

    def _release(self) -> None:
        # contexts before engines before the runtime
        self._pool.release()
        self._checked, self._seen = {}, {}
        self._factors.release()
        if self._cache is not None:
            self._cache.close()
            self._cache = None
        self._runtime = None
        self._scratch = None
        self._has_new_kernels = False

    def _require(self, succeeded: bool, block: str, step: str) -> None:
        if succeeded:
            return
        errors = self._log.take_errors()
        if any("out of memory" in message.lower() for message in errors):
            # ComfyUI answers this type by unloading other models
            raise torch.OutOfMemoryError(f"TensorRT has no GPU memory for block '{block}' ({step})")
        raise ExecutionError(block, step, errors)
