"""Host time of one block call, without what the GPU does: Python, torch and the bindings' calls.

    python benchmarks/glue.py            median and worst percentile by kind of block
    python benchmarks/glue.py --limit 60 exit 1 if a median is above so many microseconds

TensorRT is replaced by a library whose calls do nothing and CUDA streams by nothing, so two event
records and waits per block come on top. Shapes repeat, as they do while sampling; every call gets
new input tensors, as from a sampler.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from pack_import import register_pack  # noqa: E402

register_pack()

from flux_fp4.quant.onnx_export import export_blocks  # noqa: E402
from flux_fp4.trt_runtime.backend import Backend  # noqa: E402
from flux_fp4.trt_runtime.builder import build_engine  # noqa: E402
from flux_fp4.trt_runtime.engine import Engine  # noqa: E402
from flux_fp4.trt_runtime.executor import TensorRTExecutor  # noqa: E402
from flux_fp4.trt_runtime.manifest import EngineManifest, PlanEntry  # noqa: E402
from flux_fp4.trt_runtime.plan_context import PlanContext, ScratchMemory  # noqa: E402
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile  # noqa: E402
from mixed_checkpoint import linears_in_plans, save_mixed  # noqa: E402
from tiny_flux import ignore_progress, random_flux  # noqa: E402

WARM_UP = 300
CPU = torch.device("cpu")
SPEC = BuildSpec(profile=ShapeProfile(max_batch=2))


class NullContext:
    """An execution context whose calls do nothing."""

    def __init__(self, entry: PlanEntry) -> None:
        self.outputs = {
            spec.name: tuple(64 if isinstance(dim, str) else dim for dim in spec.shape)
            for spec in entry.outputs
        }
        self.outputs = {name: (1, *shape[1:]) for name, shape in self.outputs.items()}

    def set_input_shape(self, _name: str, _shape: tuple[int, ...]) -> bool:
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 1024

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.outputs[name]

    def set_device_memory(self, _address: int, _size: int) -> None:
        return None

    def set_tensor_address(self, _name: str, _address: int) -> bool:
        return True

    def execute_async_v3(self, _stream: int) -> bool:
        return True


class NullCuda:
    """Streams that are none."""

    def synchronize(self) -> None:
        return None

    @contextlib.contextmanager
    def ordered_stream(self, _device: torch.device) -> Iterator[int]:
        yield 0


def null_engine(manifest: EngineManifest) -> Engine:
    """Return an engine whose plans are loaded and do nothing."""
    backend = Backend("tensorrt_rtx", "null", _Library(), True, False)
    executor = TensorRTExecutor(Path("null"), manifest, backend, NullCuda())  # type: ignore[arg-type]
    # what load() does with a library that can load
    executor._runtime, executor._scratch = object(), ScratchMemory(CPU)
    for entry in manifest.blocks:
        context = PlanContext(entry, None, NullContext(entry), CPU, executor._require, set())
        executor._pool._contexts[entry.block] = context
    return Engine(Path("null"), manifest, executor, "null", "")


class _Library:
    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)


def inputs_of(entry: PlanEntry) -> dict[str, torch.Tensor]:
    """Return small inputs in the types that a sampler has them: host time ignores sizes."""
    sizes = {"B": 1, "N": 64, "T": 16, "S": 80}
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    return {
        spec.name: torch.zeros(
            [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape],
            dtype=dtypes[spec.dtype],
        )
        for spec in entry.inputs
    }


def microseconds(engine: Engine, entry: PlanEntry, calls: int) -> list[float]:
    """Time calls of one block."""
    rounds = [inputs_of(entry) for _ in range(4)]
    found = []
    gc.disable()
    for call in range(WARM_UP + calls):
        inputs = dict(rounds[call % len(rounds)])
        started = time.perf_counter_ns()
        engine.run(entry.block, inputs)
        found.append((time.perf_counter_ns() - started) / 1000)
    gc.enable()
    return found[WARM_UP:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, help="microseconds")
    parser.add_argument("--calls", type=int, default=3000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = random_flux()
        formats = dict.fromkeys(linears_in_plans(model), "nvfp4")
        path = Path(folder) / "tiny.safetensors"
        save_mixed(model, path, formats)
        export_blocks(path, ignore_progress)
        manifest = build_engine(path.parent, SPEC, ignore_progress)
    engine = null_engine(manifest)
    print("| block | inputs | median, us | 99 %, us |\n|---|---|---|---|")
    medians = []
    for entry in manifest.blocks[:2]:
        found = microseconds(engine, entry, arguments.calls)
        medians.append(statistics.median(found))
        worst = statistics.quantiles(found, n=100)[98]
        print(f"| {entry.kind} | {len(entry.inputs)} | {medians[-1]:.0f} | {worst:.0f} |")
    return int(arguments.limit is not None and max(medians) > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
