"""Modulation of all steps, computed once: 6.5 of FLUX.1-dev's 23.8 GB act on one vector per step.

The weights stay in main memory. When a forward pass brings a vector that is not in the table, they
go to the GPU one Linear at a time, and with them the vectors of all steps of this sampling are
computed; after that a step copies its 2 MB. Each vector goes through its Linear by itself and in
the shape of its forward pass, so results are those of weights that stay on the GPU, bit for bit.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from comfy.ldm.flux.layers import Modulation, ModulationOut, timestep_embedding
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

logger = logging.getLogger(__name__)

MAX_BYTES = 2**30
"""Main memory for vectors that may come again, as with the same prompt and another seed: about 500
steps of FLUX.1-dev."""

Key = tuple[torch.Size, torch.dtype, bytes]


class ModulationTable:
    """Serves the modulation Linears of one model.

    Attributes:
        passes: How often the weights were sent to the GPU.
    """

    def __init__(self, linears: Iterable[nn.Linear]) -> None:
        self.linears = list(linears)
        self.passes = 0
        self._position = {id(linear): index for index, linear in enumerate(self.linears)}
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()
        self._coming: Callable[[], list[Tensor]] = list
        self._vec: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    @property
    def working_bytes(self) -> int:
        """GPU memory while weights pass through: the largest, as stored and as multiplied."""
        # two copies in bf16, or one that was dequantized in fp32
        return max((4 * linear.weight.numel() for linear in self.linears), default=0)

    def begin(self, coming: Callable[[], list[Tensor]]) -> None:
        """Start a forward pass, or end it with nothing to come.

        Args:
            coming: Returns the vectors of all steps of this sampling, as far as they are known.
        """
        # only within a pass does the same tensor mean the same values
        self._vec, self._outputs, self._coming = None, (), coming

    def forget(self) -> None:
        """Drop everything; called when weights change."""
        self._kept.clear()
        self.begin(list)

    # a dictionary of bytes is nothing that torch.compile could trace
    @torch.compiler.disable
    def output(self, linear: nn.Linear, vec: Tensor) -> Tensor:
        """Return ``linear(silu(vec))``.

        Args:
            linear: One of the table's.
            vec: ``[B, K]``.

        Returns:
            ``[B, N]``.
        """
        if vec is not self._vec:
            self._outputs = self._lookup(vec)
            self._vec = vec
        return self._outputs[self._position[id(linear)]]

    def _lookup(self, vec: Tensor) -> tuple[Tensor, ...]:
        # the one wait for the GPU per forward pass
        key = _key(vec)
        if key not in self._kept:
            self._compute(vec)
        self._kept.move_to_end(key)
        flat = self._kept[key].to(vec.device)
        sizes = [len(vec) * linear.out_features for linear in self.linears]
        return tuple(part.view(len(vec), -1) for part in flat.split(sizes))

    def _compute(self, vec: Tensor) -> None:
        """Send every weight to the GPU once, for this vector and all that are known to come."""
        needed = _key(vec)
        coming = {_key(v): v for v in self._coming()}
        # steps before this one are over
        later = list(coming)[list(coming).index(needed) + 1 if needed in coming else 0 :]
        wanted = [key for key in later if key not in self._kept and key != needed]
        # more than fits would push out the very next step
        new = {key: coming[key] for key in wanted[: self._room(vec) - 1]} | {needed: vec}
        rows: list[Tensor] = []
        for linear in self.linears:
            with _on(vec.device, linear):
                outputs = [linear(functional.silu(v)[:, None]).flatten() for v in new.values()]
            rows.append(torch.stack(outputs).cpu())
        self.passes += 1
        logger.debug("Modulation of %d vectors computed", len(new))
        for key, flat in zip(new, torch.cat(rows, dim=1).unbind(), strict=True):
            # a copy each: a view would keep all of them alive
            self._kept[key] = flat.clone()
        # the vector that is needed now came last
        while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > MAX_BYTES:
            self._kept.popitem(last=False)

    def _room(self, vec: Tensor) -> int:
        """Return how many vectors like this one may be kept; at least one."""
        outputs = sum(linear.out_features for linear in self.linears)
        return max(1, MAX_BYTES // max(1, len(vec) * outputs * vec.element_size()))


class TabledModulation(Modulation):
    """ComfyUI's Modulation with a table in front of its Linear."""

    table: ModulationTable | None = None

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        if self.table is None or vec.ndim != 2:
            return super().forward(vec)
        parts = self.table.output(self.lin, vec)[:, None].chunk(self.multiplier, dim=-1)
        second = ModulationOut(*parts[3:]) if self.is_double else None
        return ModulationOut(*parts[:3]), second


def install_table(model: BaseModel) -> ModulationTable:
    """Put one table before all modulation Linears in the blocks of an engine's model."""
    flux, owner = model.diffusion_model, weakref.ref(model)
    modules = [m for m in flux.modules() if isinstance(m, TabledModulation)]
    table = ModulationTable(module.lin for module in modules)
    for module in modules:
        module.table = table
    signature = inspect.signature(flux.forward)

    def begin(flux: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = signature.bind(*args, **kwargs).arguments
        model = owner()
        assert model is not None, "its own module runs"
        # nodes replace it for a sampling, so it is asked for then
        sampling = model.model_sampling
        table.begin(lambda: _vectors_of_steps(flux, call, sampling.timestep))

    flux.register_forward_pre_hook(begin, with_kwargs=True)
    # the call's tensors must not outlive it
    flux.register_forward_hook(lambda *_call: table.begin(list), always_call=True)
    return table


def _vectors_of_steps(
    flux: Any, call: Mapping[str, Any], timesteps_of: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return ``vec`` of every step of this sampling, for the prompts of one call."""
    sigmas = call.get("transformer_options", {}).get("sample_sigmas")
    if sigmas is None:
        return []
    timestep, dtype = call["timestep"], call["x"].dtype
    # the last sigma is where sampling ends, not a step
    steps = (timesteps_of(sigma.to(timestep.device).expand(len(timestep))) for sigma in sigmas[:-1])
    return [_vector(flux, step.float(), call, dtype) for step in steps]


def _vector(flux: Any, timestep: Tensor, call: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    # As in Flux.forward_orig (ComfyUI 0.30). Should that change, no vector is found in the table:
    # sampling gets slower, never wrong.
    vec = flux.time_in(timestep_embedding(timestep, 256).to(dtype))
    guidance, y = call.get("guidance"), call.get("y")
    if flux.params.guidance_embed and guidance is not None:
        vec = vec + flux.guidance_in(timestep_embedding(guidance, 256).to(dtype))
    if flux.vector_in is not None:
        if y is None:
            y = torch.zeros(len(vec), flux.params.vec_in_dim, device=vec.device, dtype=dtype)
        vec = vec + flux.vector_in(y[:, : flux.params.vec_in_dim])
    return vec


@contextmanager
def _on(device: torch.device, linear: nn.Linear) -> Iterator[None]:
    """Have the parameters of a Linear on a device for a while; the stored ones stay as they are."""
    stored = dict(linear.named_parameters(recurse=False))
    try:
        for name, parameter in stored.items():
            moved = nn.Parameter(parameter.detach().to(device), requires_grad=False)
            setattr(linear, name, moved)
        yield
    finally:
        for name, parameter in stored.items():
            setattr(linear, name, parameter)


def _key(vec: Tensor) -> Key:
    stored = vec.contiguous().view(torch.uint8).cpu()
    return vec.shape, vec.dtype, stored.numpy().tobytes()
