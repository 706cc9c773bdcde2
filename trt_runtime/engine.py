"""An engine: the blocks of one checkpoint, ready to run on the backend that this machine has."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from .adapters import Adapters
from .backend import choose_backend, probe_gpu
from .contract import TensorSpec
from .errors import BlockInputError
from .manifest import EngineManifest, PlanEntry, load_manifest, verify_engine
from .self_test import Machine, SelfTest
from .spec import ShapeProfile

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

    def missing_lora_plans(self, blocks: Sequence[str]) -> list[str]:
        """Return the blocks that cannot take adapters before something is built."""

    def use(self, adapters: Adapters) -> None:
        """Run these adapters and no others, loaded or not."""

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
    ) -> None:
        self.manifest = manifest
        self.folder = folder
        self.backend_name = backend_name
        self.backend_reason = backend_reason
        self._executor = executor
        self._self_test = self_test
        self._adapters: Adapters = {}
        self._entries = {entry.block: entry for entry in manifest.blocks}

    @classmethod
    def open(
        cls, engine_dir: Path, backend: str = "auto", device: torch.device | None = None
    ) -> Engine:
        """Check an engine folder and choose the backend; nothing is loaded yet.

        Args:
            engine_dir: Folder with manifest.json.
            backend: "auto", "reference", or the library that the plans are for.
            device: Where the engine will be loaded; None is torch's current CUDA device.

        Raises:
            EngineError: the engine is missing, unfinished, changed, stale, or not for this machine.
        """
        manifest = load_manifest(engine_dir)
        choice = choose_backend(backend, manifest.backend, manifest.targets, probe_gpu(device))
        verify_engine(engine_dir, manifest, choice.backend)
        if choice.reason:
            logger.info("FLUX FP4 runs on the reference backend (CPU): %s", choice.reason)
        executor: Executor
        if choice.backend is None:
            from .reference import ReferenceExecutor

            executor = ReferenceExecutor(engine_dir.parent)
        else:
            from .executor import TensorRTExecutor

            executor = TensorRTExecutor(engine_dir, manifest, choice.backend)
        self_test = SelfTest(engine_dir, manifest)
        return cls(engine_dir, manifest, executor, choice.name, choice.reason, self_test)

    @property
    def loaded(self) -> bool:
        """Whether run() can be called."""
        return self._executor.loaded

    @property
    def weight_bytes(self) -> int:
        """Bytes that the blocks' weights take once loaded."""
        return self._executor.weight_bytes

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

        The first time on a GPU, driver and library the engine is tested against the reference.

        Raises:
            SelfTestError: It computes something else; it is not loaded then.
        """
        if self._executor.loaded:
            return
        self._executor.load(device)
        test, machine = self._self_test, self._executor.machine
        if test is None or machine is None or test.has_passed(machine):
            return
        complete = False
        try:
            # adapters change what blocks compute
            self._executor.use({})
            test.run(machine, self.run)
            self._executor.use(self._adapters)
            complete = True
        finally:
            if not complete:
                self._executor.unload()

    def unload(self) -> None:
        """Free weights, contexts and buffers; load() brings them back."""
        self._executor.unload()

    def missing_lora_plans(self, blocks: Sequence[str]) -> list[str]:
        """Return the blocks whose variant `lora_plans.build_lora_plans` must build first."""
        return self._executor.missing_lora_plans(blocks)

    def use_adapters(self, adapters: Adapters) -> None:
        """Add low-rank factors to Linears; they replace those that were in use.

        Blocks without an adapter run their own plan, so no adapters at all give the results of
        before, bit for bit.

        Args:
            adapters: By block, then by Linear.

        Raises:
            BlockInputError: The engine has no such block; nothing has changed.
            LoraPlanMissingError: A variant was not built; nothing has changed.
            AdapterError: Factors do not fit; nothing has changed.
        """
        for block in adapters:
            if block not in self._entries:
                raise BlockInputError(block, f"the engine has {len(self._entries)} other blocks")
        self._executor.use(adapters)
        self._adapters = adapters

    def run(self, block: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run one block.

        A batch above the profile's maximum is run in parts. Inputs of batch 1 serve the whole
        batch.

        Args:
            block: Such as "double_blocks.0".
            inputs: Every input of the block's signature; floating types are converted.

        Returns:
            The outputs by name, in the type of the first input (img or x) and on its device.

        Raises:
            BlockInputError: a name, rank, size or type does not match the signature.
            ShapeProfileError: more or fewer tokens than the engine was built for.
        """
        entry = self._entries.get(block)
        if entry is None:
            raise BlockInputError(block, f"the engine has {len(self._entries)} other blocks")
        sizes = matched_sizes(entry, inputs)
        check_profile(self.manifest.profile, sizes)
        parts = [
            self._executor.run(block, part)
            for part in batch_parts(entry, inputs, sizes["B"], self.manifest.profile.max_batch)
        ]
        dtype = inputs[entry.inputs[0].name].dtype
        return {
            name: torch.cat([part[name] for part in parts]).to(dtype)
            if len(parts) > 1
            else parts[0][name].to(dtype)
            for name in parts[0]
        }


def matched_sizes(entry: PlanEntry, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the size of every dynamic axis, after matching all inputs with the signature.

    Raises:
        BlockInputError: a name, rank, size or type does not match.
    """
    expected = {spec.name for spec in entry.inputs}
    if inputs.keys() != expected:
        missing, unknown = sorted(expected - inputs.keys()), sorted(inputs.keys() - expected)
        raise BlockInputError(entry.block, f"missing inputs {missing}, unexpected inputs {unknown}")
    sizes = {"B": max(tensor.shape[0] if tensor.dim() else 1 for tensor in inputs.values())}
    for spec in entry.inputs:
        _match(entry.block, spec, inputs[spec.name], sizes)
    if {"N", "T", "S"} <= sizes.keys() and sizes["S"] != sizes["N"] + sizes["T"]:
        raise BlockInputError(
            entry.block,
            f"{sizes['N']} image and {sizes['T']} text tokens, but rotary tables for {sizes['S']}",
        )
    return sizes


def _match(block: str, spec: TensorSpec, tensor: torch.Tensor, sizes: dict[str, int]) -> None:
    if not tensor.is_floating_point():
        raise BlockInputError(block, f"input '{spec.name}' is {tensor.dtype}, not floating point")
    shape = tuple(tensor.shape)
    fits = len(shape) == len(spec.shape)
    for dim, size in zip(spec.shape, shape):  # noqa: B905  # the ranks were compared
        if isinstance(dim, str):
            allowed = (1, sizes["B"]) if dim == "B" else (sizes.setdefault(dim, size),)
        else:
            allowed = (dim,)
        fits = fits and size in allowed
    if not fits:
        wanted = [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape]
        raise BlockInputError(block, f"input '{spec.name}' is {list(shape)}, expected {wanted}")


def check_profile(profile: ShapeProfile, sizes: Mapping[str, int]) -> None:
    """Raise ShapeProfileError when a token count is outside the profile."""
    for axis in ("N", "T", "S"):
        if axis in sizes:
            profile.range(axis).check(sizes[axis])


def batch_parts(
    entry: PlanEntry, inputs: Mapping[str, torch.Tensor], batch: int, max_batch: int
) -> list[dict[str, torch.Tensor]]:
    """Split inputs along the batch into parts of at most `max_batch`, as equal as possible."""
    count = math.ceil(batch / max_batch)
    bounds = [batch * i // count for i in range(count + 1)]
    dynamic = {spec.name for spec in entry.inputs if spec.shape[:1] == ("B",)}
    full = {
        name: tensor.expand(batch, *tensor.shape[1:]) if name in dynamic else tensor
        for name, tensor in inputs.items()
    }
    return [
        {name: t[start:end] if name in dynamic else t for name, t in full.items()}
        for start, end in itertools.pairwise(bounds)
    ]
