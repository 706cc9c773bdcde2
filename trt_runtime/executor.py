"""Runs plans with TensorRT or TensorRT-RTX on torch tensors, in memory that torch allocates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .backend import Backend, RuntimeLog, runtime_log
from .cuda_access import CudaAccess
from .errors import EngineNotLoadedError, ExecutionError
from .manifest import EngineManifest, PlanEntry, read_plan
from .runtime_cache import FILE_NAME, RuntimeCache

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRT_DTYPES = {"bf16": "BF16", "fp16": "HALF", "fp32": "FLOAT"}
Shapes = tuple[tuple[int, ...], ...]


class ScratchMemory:
    """One buffer for the activations of all blocks, which run one after the other on one stream.

    torch's CUDA allocator aligns to 512 bytes; TensorRT needs 256.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def address(self) -> int:
        """Device pointer of the buffer."""
        return self._buffer.data_ptr()

    @property
    def size_bytes(self) -> int:
        """Size of the buffer."""
        return self._buffer.nbytes

    def reserve(self, size_bytes: int) -> None:
        """Make the buffer at least `size_bytes` large; its content is not kept."""
        if size_bytes > self.size_bytes:
            device = self._buffer.device
            # the old buffer goes first: at large sizes both would not fit
            self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
            self._buffer = torch.empty(size_bytes, dtype=torch.uint8, device=device)


@dataclass
class LoadedBlock:
    """A deserialized plan with its context and what was last set on it."""

    entry: PlanEntry
    engine: Any
    context: Any
    shapes: Shapes = ()
    output_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    seen: set[Shapes] = field(default_factory=set)
    """Shapes whose kernels exist."""
    scratch_bytes: int = 0
    scratch: tuple[int, int] = (0, 0)
    """Address and size of the scratch memory that the context knows."""


class TensorRTExecutor:
    """Holds all plans of an engine on one GPU.

    Args:
        engine_dir: Folder of the plans.
        manifest: The verified manifest.
        backend: The library.
        cuda: Device and streams.
    """

    def __init__(
        self,
        engine_dir: Path,
        manifest: EngineManifest,
        backend: Backend,
        cuda: CudaAccess | None = None,
    ) -> None:
        self._engine_dir, self._manifest, self._backend = engine_dir, manifest, backend
        self._cuda = cuda or CudaAccess()
        self._log: RuntimeLog = runtime_log(backend)
        self._runtime: Any = None
        self._blocks: dict[str, LoadedBlock] = {}
        self._scratch: ScratchMemory | None = None
        self._cache: RuntimeCache | None = None
        self._has_new_kernels = False
        self._device = torch.device("cpu")

    @property
    def loaded(self) -> bool:
        """Whether run() can be called."""
        return bool(self._blocks)

    @property
    def weight_bytes(self) -> int:
        """GPU memory of the weights: a plan is its weights and a few hundred kilobytes."""
        return self._manifest.plan_bytes

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
        if self._blocks:
            return
        self._cuda.prepare(device, self._backend.name, self._manifest.targets)
        self._device = device
        complete = False
        try:
            with self._cuda.activated(device):
                self._load_blocks()
            complete = True
        finally:
            if not complete:
                self._release()

    def unload(self) -> None:
        """Wait for the GPU, keep compiled kernels, and free plans, contexts and scratch memory."""
        if not self._blocks:
            return
        self._cuda.finish()
        if self._has_new_kernels:
            self._save_kernels()
        self._release()

    def run(self, block: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Enqueue one block; the results are valid on torch's current stream.

        Raises:
            EngineNotLoadedError: load() was not called.
            ExecutionError: TensorRT refused shapes or launch.
        """
        loaded = self._blocks.get(block)
        if loaded is None or self._scratch is None:
            raise EngineNotLoadedError(block)
        # alive until the end of this call, by when the current stream waits for the engine's
        tensors = {
            spec.name: inputs[spec.name].to(self._device, TORCH_DTYPES[spec.dtype]).contiguous()
            for spec in loaded.entry.inputs
        }
        self._set_shapes(loaded, tensors)
        self._set_scratch(loaded, self._scratch)
        outputs = {
            spec.name: torch.empty(
                loaded.output_shapes[spec.name],
                dtype=TORCH_DTYPES[spec.dtype],
                device=self._device,
            )
            for spec in loaded.entry.outputs
        }
        for name, tensor in (*tensors.items(), *outputs.items()):
            self._require(
                loaded.context.set_tensor_address(name, tensor.data_ptr()),
                block,
                "set_tensor_address",
            )
        with self._cuda.ordered_stream(self._device) as stream:
            self._require(loaded.context.execute_async_v3(stream), block, "execute_async_v3")
        return outputs

    def _load_blocks(self) -> None:
        self._log.take_errors()
        self._runtime = self._backend.module.Runtime(self._log.interface)
        if self._backend.has_runtime_cache:
            owner = f"{self._backend.label} on {self._device_name()}"
            self._cache = RuntimeCache(self._engine_dir / FILE_NAME, owner)
        for entry in self._manifest.blocks:
            engine = self._runtime.deserialize_cuda_engine(read_plan(self._engine_dir, entry))
            self._require(engine is not None, entry.block, "deserialize_cuda_engine")
            self._check_signature(entry, engine)
            context = self._context(engine)
            self._require(context is not None, entry.block, "create_execution_context")
            self._blocks[entry.block] = LoadedBlock(entry, engine, context)
        self._scratch = ScratchMemory(self._device)
        self._save_kernels()

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"

    def _check_signature(self, entry: PlanEntry, engine: Any) -> None:
        """The addresses set later are raw pointers: names, directions and types must be right."""
        trt = self._backend.module
        found = {
            (name, engine.get_tensor_mode(name), engine.get_tensor_dtype(name))
            for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors))
        }
        modes = ((trt.TensorIOMode.INPUT, entry.inputs), (trt.TensorIOMode.OUTPUT, entry.outputs))
        expected = {
            (spec.name, mode, getattr(trt.DataType, TRT_DTYPES[spec.dtype]))
            for mode, specs in modes
            for spec in specs
        }
        if found != expected:
            names = sorted({name for name, _, _ in found ^ expected})
            raise ExecutionError(entry.block, "its signature", [f"unexpected tensors {names}"])

    def _context(self, engine: Any) -> Any:
        strategy = self._backend.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cache is None:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        self._cache.attach(config)
        return engine.create_execution_context(config)

    def _set_shapes(self, loaded: LoadedBlock, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set shapes when they differ from the last run's; a sampler repeats them every step."""
        shapes = tuple(tuple(tensor.shape) for tensor in tensors.values())
        if shapes in loaded.seen and self._has_new_kernels:
            self._save_kernels()
        if shapes == loaded.shapes:
            return
        context, block = loaded.context, loaded.entry.block
        # forgotten first: after a failure the next run must set all of them again
        loaded.shapes = ()
        for name, shape in zip(tensors, shapes, strict=True):
            self._require(context.set_input_shape(name, shape), block, f"set_input_shape '{name}'")
        loaded.scratch_bytes = context.update_device_memory_size_for_shapes()
        # the context asks for its memory again after the sizes were computed
        loaded.scratch = (0, 0)
        loaded.output_shapes = {
            spec.name: tuple(context.get_tensor_shape(spec.name)) for spec in loaded.entry.outputs
        }
        loaded.shapes = shapes
        self._has_new_kernels = self._has_new_kernels or shapes not in loaded.seen
        loaded.seen.add(shapes)

    def _set_scratch(self, loaded: LoadedBlock, scratch: ScratchMemory) -> None:
        scratch.reserve(loaded.scratch_bytes)
        wanted = (scratch.address, scratch.size_bytes)
        if loaded.scratch != wanted:
            loaded.context.set_device_memory(*wanted)
            loaded.scratch = wanted

    def _save_kernels(self) -> None:
        """Store what was compiled: after loading, when shapes repeat, and before unloading."""
        self._has_new_kernels = False
        if self._cache is not None:
            self._cache.save()

    def _release(self) -> None:
        # contexts before engines before the runtime
        for loaded in self._blocks.values():
            loaded.context = None
            loaded.engine = None
        self._blocks = {}
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
