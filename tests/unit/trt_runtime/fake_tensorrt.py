"""A TensorRT of recorded calls: the names and rules of the real API, on CPU tensors."""

from __future__ import annotations

import contextlib
import enum
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flux_fp4.trt_runtime.backend import Backend
from flux_fp4.trt_runtime.contract import LORA_DOWN, LORA_UP
from flux_fp4.trt_runtime.digest import digest_of_bytes
from flux_fp4.trt_runtime.manifest import EngineManifest, PlanEntry


def with_fake_plan(engine_dir: Path, entry: PlanEntry, remark: str = "") -> PlanEntry:
    """Store the block's name as its plan, and behind it what tells two plans of a block apart."""
    plan = f"{entry.block} {remark}".strip().encode()
    (engine_dir / entry.file).write_bytes(plan)
    return entry.model_copy(update={"digest": digest_of_bytes(plan), "bytes": len(plan)})


class DataType(enum.Enum):
    FLOAT = "fp32"
    HALF = "fp16"
    BF16 = "bf16"


class TensorIOMode(enum.Enum):
    INPUT = 0
    OUTPUT = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 1


class CudaGraphStrategy(enum.Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class EngineValidity(enum.IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(enum.IntEnum):
    OLD_CUDA_DRIVER = 4
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: int, message: str) -> None:
        raise AssertionError("not overridden")


@dataclass
class FakeLibrary:
    """Stands for the module; plans are the names of their blocks."""

    manifest: EngineManifest
    variants: Sequence[PlanEntry] = ()
    bytes_per_token: int = 1000
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    """Names of calls that fail."""
    errors: list[str] = field(default_factory=list)
    """What the library logs when a call fails."""
    cache_content: bytes = b"compiled"
    accepted_cache: bytes = b"compiled"
    cache_loaded: list[bytes] = field(default_factory=list)
    alive: set[str] = field(default_factory=set)
    """Engines and contexts that exist."""

    graphs: list[CudaGraphStrategy] = field(default_factory=list)
    """What each context was made with."""

    invalid: int | None = None
    """Diagnostics of every plan; None: plans are valid."""

    DataType = DataType
    CudaGraphStrategy = CudaGraphStrategy
    EngineValidity = EngineValidity
    EngineInvalidityDiagnostics = EngineInvalidityDiagnostics
    TensorIOMode = TensorIOMode
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    ILogger = ILogger

    def Runtime(self, logger: ILogger) -> FakeRuntime:  # noqa: N802  # the library's name
        self.logger = logger
        return FakeRuntime(self)

    def entry_of(self, plan: bytes | mmap.mmap) -> PlanEntry:
        block = bytes(plan).split()[0].decode()
        return next(e for e in (*self.manifest.blocks, *self.variants) if e.block == block)

    def fails(self, call: str) -> bool:
        if call not in self.refused:
            return False
        for message in self.errors:
            self.logger.log(ILogger.ERROR, message)
        return True

    def backend(self, has_runtime_cache: bool = True) -> Backend:
        return Backend("tensorrt_rtx", "1.7", Handle(self), True, has_runtime_cache)


@dataclass(eq=False)
class Handle:
    """Hashable stand-in for the module object."""

    library: FakeLibrary

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)


@dataclass
class FakeRuntime:
    library: FakeLibrary

    def get_engine_validity(self, buffer: bytes | mmap.mmap) -> tuple[EngineValidity, int]:
        invalid = self.library.invalid
        return (EngineValidity.VALID, 0) if invalid is None else (EngineValidity.INVALID, invalid)

    def deserialize_cuda_engine(self, serialized_engine: bytes | mmap.mmap) -> FakeEngine | None:
        if self.library.fails("deserialize_cuda_engine"):
            return None
        entry = self.library.entry_of(serialized_engine)
        self.library.calls.append(("deserialize", bytes(serialized_engine).decode()))
        return FakeEngine(self.library, entry)


class FakeEngine:
    def __init__(self, library: FakeLibrary, entry: PlanEntry) -> None:
        self.library, self.entry = library, entry
        self.specs = {s.name: s for s in (*entry.inputs, *entry.outputs)}
        self.num_io_tensors = len(self.specs)
        library.alive.add(f"engine {entry.block}")

    def __del__(self) -> None:
        # a context keeps its engine alive, as the real ones need
        self.library.alive.discard(f"engine {self.entry.block}")

    def get_tensor_name(self, index: int) -> str:
        return list(self.specs)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        outputs = {spec.name for spec in self.entry.outputs}
        return TensorIOMode.OUTPUT if name in outputs else TensorIOMode.INPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        if "wrong dtype" in self.library.refused:
            return DataType.HALF
        return DataType(self.specs[name].dtype)

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig(self.library)

    def create_execution_context(self, config: Any) -> FakeContext | None:
        if self.library.fails("create_execution_context"):
            return None
        strategy = config.strategy if isinstance(config, FakeConfig) else config
        self.library.calls.append(("context", self.entry.block, strategy))
        if isinstance(config, FakeConfig):
            self.library.graphs.append(config.cuda_graph_strategy)
        return FakeContext(self)


class FakeConfig:
    def __init__(self, library: FakeLibrary) -> None:
        self.library = library
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeCache:
        self.library.calls.append(("create_runtime_cache",))
        return FakeCache(self.library)

    def set_runtime_cache(self, cache: FakeCache) -> bool:
        self.library.calls.append(("set_runtime_cache", id(cache)))
        return True


@dataclass
class FakeCache:
    library: FakeLibrary

    def deserialize(self, blob: bytes) -> bool:
        self.library.cache_loaded.append(blob)
        return blob == self.library.accepted_cache

    def serialize(self) -> bytes:
        return self.library.cache_content


class FakeContext:
    """Keeps the rules: all shapes, then memory of that size, then addresses, then execution."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.library = engine, engine.library
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None
        self.needed = 0
        self.library.alive.add(f"context {engine.entry.block}")

    def __del__(self) -> None:
        self.library.alive.discard(f"context {self.engine.entry.block}")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.library.calls.append(("shape", self.engine.entry.block, name, shape))
        self.shapes[name] = shape
        self.memory = None
        return not self.library.fails("set_input_shape")

    def update_device_memory_size_for_shapes(self) -> int:
        assert self.shapes.keys() == {spec.name for spec in self.engine.entry.inputs}
        tokens = max(shape[0] * shape[1] for shape in self.shapes.values() if len(shape) == 3)
        self.needed = tokens * self.library.bytes_per_token
        return self.needed

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        sizes = {}
        for spec in self.engine.entry.inputs:
            sizes |= dict(zip(spec.shape, self.shapes[spec.name], strict=True))
        spec = self.engine.specs[name]
        return [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape]

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.needed
        self.library.calls.append(("memory", self.engine.entry.block, memory, size))
        self.memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory != 0
        self.addresses[name] = memory
        return not self.library.fails("set_tensor_address")

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self.memory is not None
        assert self.memory[1] >= self.needed
        if self.library.fails("execute_async_v3"):
            return False
        assert self.addresses.keys() == self.engine.specs.keys()
        self.library.calls.append(("execute", self.engine.entry.block, stream_handle))
        self._compute()
        return True

    def _compute(self) -> None:
        """Write 2 * a stream to its output, and add what its first factors multiply to.

        Reads and writes through the raw addresses.
        """
        entry = self.engine.entry
        for spec in entry.outputs:
            source = spec.name.removesuffix("_out")
            value = self._tensor(source, self.shapes[source], spec.dtype)
            out = self._tensor(spec.name, tuple(self.get_tensor_shape(spec.name)), spec.dtype)
            out.copy_(2 * value)
            for down in (s for s in entry.inputs if s.name.endswith(LORA_DOWN)):
                up = self.engine.specs[down.name.removesuffix(LORA_DOWN) + LORA_UP]
                first, second = (
                    self._tensor(s.name, self.shapes[s.name], s.dtype) for s in (down, up)
                )
                out.add_(torch.mm(first.flatten(1), second.flatten(0, 1)).sum())

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        import ctypes
        import math

        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        size = math.prod(shape) * kinds[dtype].itemsize
        buffer = (ctypes.c_char * size).from_address(self.addresses[name])
        return torch.frombuffer(buffer, dtype=kinds[dtype]).view(shape)


@dataclass
class FakeCuda:
    """Device and streams for the executor's tests."""

    calls: list[tuple[Any, ...]]
    stream: int = 77

    def prepare(self, device: torch.device, backend: str, targets: Sequence[str]) -> None:
        self.calls.append(("prepare", device, backend, tuple(targets)))

    @contextlib.contextmanager
    def activated(self, device: torch.device) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def ordered_stream(self, device: torch.device) -> Iterator[int]:
        self.calls.append(("before",))
        yield self.stream
        self.calls.append(("after",))

    def synchronize(self) -> None:
        self.calls.append(("synchronize",))

    def finish(self) -> None:
        self.calls.append(("finish",))
