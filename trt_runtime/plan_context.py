"""A deserialized plan with its execution context, and the scratch memory that contexts share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .contract import TensorSpec, is_factor
from .manifest import PlanEntry

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Shapes = tuple[torch.Size, ...]
Require = Callable[[bool, str, str], None]
"""Raises unless a call succeeded; takes the result, the block and the call's name."""


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


class PlanContext:
    """Shapes, addresses and scratch memory stay set between runs; only changes are set again.

    A sampler calls every block with the same shapes in every step, so in steady state a run sets
    nothing but the addresses that torch's allocator has changed.
    """

    def __init__(
        self,
        entry: PlanEntry,
        engine: Any,
        context: Any,
        device: torch.device,
        require: Require,
        seen: set[Shapes],
    ) -> None:
        """Take over a context that nothing was set on.

        Args:
            entry: What the manifest says of the plan.
            engine: The deserialized plan; contexts need it alive.
            context: Its execution context, without memory of its own.
            device: Where all tensors go.
            require: Raises for a call that failed.
            seen: Shapes that kernels of this plan were compiled for; outlives the context.
        """
        self.entry = entry
        self._engine, self._context, self._device, self._require = engine, context, device, require
        self._inputs = _types(spec for spec in entry.inputs if not is_factor(spec.name))
        self._input_names = [name for name, _ in self._inputs]
        self._outputs = _types(entry.outputs)
        self._factors: dict[str, torch.Tensor] = {}
        self._shapes: list[torch.Size] = []
        self._output_shapes: list[tuple[int, ...]] = []
        self._seen = seen
        self._addresses: dict[str, int] = {}
        self._scratch_bytes = 0
        self._scratch: tuple[int, int] = (0, 0)

    def set_factors(self, factors: Mapping[str, torch.Tensor]) -> None:
        """Use other low-rank factors from the next run on; they live as long as the context."""
        self._factors = dict(factors)
        self._shapes = []

    def converted(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the inputs in the plan's order, type and memory layout."""
        tensors = []
        for name, dtype in self._inputs:
            tensor = inputs[name]
            if tensor.dtype is not dtype or tensor.device != self._device:
                tensor = tensor.to(self._device, dtype)
            tensors.append(tensor if tensor.is_contiguous() else tensor.contiguous())
        return tensors

    def has_seen(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Tell whether kernels for these shapes exist."""
        return tuple(tensor.shape for tensor in tensors) in self._seen

    def set_shapes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Set shapes that differ from the last run's; return whether they were never seen."""
        shapes = [tensor.shape for tensor in tensors]
        if shapes == self._shapes:
            return False
        # forgotten first: after a failure the next run must set all of them again
        self._shapes = []
        factors = ((name, tensor.shape) for name, tensor in self._factors.items())
        for name, shape in (*zip(self._input_names, shapes, strict=True), *factors):
            self._check(
                self._context.set_input_shape(name, tuple(shape)), f"set_input_shape '{name}'"
            )
        self._scratch_bytes = self._context.update_device_memory_size_for_shapes()
        # the context asks for its memory again after the sizes were computed
        self._scratch = (0, 0)
        self._output_shapes = [
            tuple(self._context.get_tensor_shape(name)) for name, _ in self._outputs
        ]
        self._set_addresses(self._factors.items())
        self._shapes = shapes
        new = tuple(shapes) not in self._seen
        self._seen.add(tuple(shapes))
        return new

    def set_scratch(self, scratch: ScratchMemory) -> None:
        """Give the context memory for its activations, if it has other or none."""
        scratch.reserve(self._scratch_bytes)
        wanted = (scratch.address, scratch.size_bytes)
        if self._scratch != wanted:
            self._context.set_device_memory(*wanted)
            self._scratch = wanted

    def bind(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Set the addresses of inputs and of new outputs; return the outputs."""
        outputs = {
            name: torch.empty(shape, dtype=dtype, device=self._device)
            for (name, dtype), shape in zip(self._outputs, self._output_shapes, strict=True)
        }
        self._set_addresses(zip(self._input_names, tensors, strict=True))
        self._set_addresses(outputs.items())
        return outputs

    def execute(self, stream: int) -> None:
        """Enqueue on a CUDA stream."""
        self._check(self._context.execute_async_v3(stream), "execute_async_v3")

    def release(self) -> None:
        """Free the context, then the plan."""
        self._context = None
        self._engine = None
        self._factors = {}

    def _set_addresses(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        known = self._addresses
        for name, tensor in tensors:
            address = tensor.data_ptr()
            if known.get(name) != address:
                # forgotten first, for the same reason as shapes
                known.pop(name, None)
                self._check(self._context.set_tensor_address(name, address), "set_tensor_address")
                known[name] = address

    def _check(self, succeeded: bool, step: str) -> None:
        self._require(succeeded, self.entry.block, step)


def _types(specs: Iterable[TensorSpec]) -> tuple[tuple[str, torch.dtype], ...]:
    return tuple((spec.name, TORCH_DTYPES[spec.dtype]) for spec in specs)
