"""What an engine's blocks take on this machine, beside the same blocks in PyTorch.

Both run in turns in one process: what else the machine does falls on both, so the ratio holds where
seconds alone would not. Kinds of blocks are told apart, because a model is so many of each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .block_call import check_profile
from .engine import Engine
from .manifest import PlanEntry
from .progress import Progress
from .self_test import example_inputs
from .stopwatch import Stopwatch, stopwatch_for

Inputs = Mapping[str, torch.Tensor]
Baseline = Callable[[Inputs], object]
"""Runs one block in PyTorch on an engine's inputs."""


@dataclass(frozen=True)
class CallSizes:
    """What one call of every block works on.

    Attributes:
        batch: Pictures.
        img_tokens: Of each picture.
        txt_tokens: Of each prompt.
    """

    batch: int
    img_tokens: int
    txt_tokens: int

    @property
    def axes(self) -> dict[str, int]:
        """Sizes by dynamic axis of the contract."""
        img, txt = self.img_tokens, self.txt_tokens
        return {"B": self.batch, "N": img, "T": txt, "S": img + txt}


@dataclass(frozen=True)
class Spread:
    """Seconds of equal calls: the middle one, and between what half of all lie."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Summarize seconds; a single one is all three."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0])
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class KindTiming:
    """Blocks of one kind.

    Attributes:
        kind: ``double`` or ``single``.
        blocks: How many the engine has.
        first_seconds: Of the first call of the kind's first block: kernels are compiled then,
            unless the folder had them from an earlier run.
        engine: Seconds per call, over all blocks of the kind and all repetitions.
        baseline: Seconds per call of the block in PyTorch.
    """

    kind: str
    blocks: int
    first_seconds: float
    engine: Spread
    baseline: Spread

    @property
    def ratio(self) -> float:
        """How often the engine's block runs in the time of one in PyTorch."""
        return self.baseline.median / self.engine.median


@dataclass(frozen=True)
class EngineTiming:
    """A measured engine.

    Attributes:
        load_seconds: Until all plans were ready; the first time on a machine the self-test is in.
        kinds: Each kind of block.
        step: Seconds of one pass through all blocks.
        baseline_step: Computed: PyTorch's median of each kind, times the number of its blocks.
        weight_bytes: Memory of the weights that are loaded.
        device_bytes: By how much the GPU's free memory shrank from before loading to the end, with
            what PyTorch keeps, one baseline block of each kind included; None without a GPU.
    """

    load_seconds: float
    kinds: tuple[KindTiming, ...]
    step: Spread
    baseline_step: float
    weight_bytes: int
    device_bytes: int | None

    @property
    def ratio(self) -> float:
        """How often the engine's blocks run in the time of PyTorch's."""
        return self.baseline_step / self.step.median


def measure_engine(
    engine: Engine,
    sizes: CallSizes,
    baselines: Mapping[str, Baseline],
    device: torch.device,
    warm_up: int,
    repetitions: int,
    progress: Progress,
) -> EngineTiming:
    """Load an engine, time its blocks, and unload it.

    Args:
        engine: Opened, not loaded.
        sizes: What each call works on.
        baselines: The block in PyTorch, by kind.
        device: Where the engine and the inputs go.
        warm_up: Passes through all blocks that do not count, the first one included; at least 1.
        repetitions: Passes that count.
        progress: Called before every pass; may raise to cancel.

    Raises:
        ShapeProfileError: The engine takes no such sizes; it was not loaded.
        EngineError: It cannot be loaded or run.
    """
    check_profile(engine.manifest.profile, sizes.axes)
    free = _free_bytes(device)
    progress("Loading the engine", 0, warm_up + repetitions)
    started = time.perf_counter()
    engine.load(device)
    load_seconds = time.perf_counter() - started
    try:
        passes = _Passes(engine, sizes, baselines, device)
        for done in range(warm_up + repetitions):
            progress("Measuring" if done >= warm_up else "Warming up", done, warm_up + repetitions)
            passes.run(counts=done >= warm_up)
        weight_bytes, still_free = engine.weight_bytes, _free_bytes(device)
    finally:
        engine.unload()
    kinds = passes.kinds()
    return EngineTiming(
        load_seconds=load_seconds,
        kinds=kinds,
        step=Spread.of(passes.steps),
        baseline_step=sum(kind.blocks * kind.baseline.median for kind in kinds),
        weight_bytes=weight_bytes,
        device_bytes=None if free is None or still_free is None else free - still_free,
    )


class _Passes:
    """Passes through all blocks of a loaded engine, each followed by the baselines."""

    def __init__(
        self,
        engine: Engine,
        sizes: CallSizes,
        baselines: Mapping[str, Baseline],
        device: torch.device,
    ) -> None:
        self._engine, self._baselines = engine, baselines
        self._watch: Stopwatch = stopwatch_for(device)
        self._blocks: dict[str, list[PlanEntry]] = {}
        for entry in engine.manifest.blocks:
            self._blocks.setdefault(entry.kind, []).append(entry)
        self._inputs = {
            kind: {
                # a sampler has its states in bf16 and the rotary tables in fp32
                name: tensor.to(device, None if name in ("cos", "sin") else torch.bfloat16)
                for name, tensor in example_inputs(entries[0], sizes.axes).items()
            }
            for kind, entries in self._blocks.items()
        }
        self._first: dict[str, float] = {}
        self._engine_seconds: dict[str, list[float]] = {kind: [] for kind in self._blocks}
        self._baseline_seconds: dict[str, list[float]] = {kind: [] for kind in self._blocks}
        self.steps: list[float] = []

    @torch.inference_mode()
    def run(self, counts: bool) -> None:
        """Run all blocks once in their order, then each baseline."""
        marks = [self._watch.mark()]
        for entry in self._engine.manifest.blocks:
            self._engine.run(entry.block, dict(self._inputs[entry.kind]))
            marks.append(self._watch.mark())
        seconds = self._watch.between(marks)
        for entry, each in zip(self._engine.manifest.blocks, seconds, strict=True):
            self._first.setdefault(entry.kind, each)
            if counts:
                self._engine_seconds[entry.kind].append(each)
        if counts:
            self.steps.append(sum(seconds))
        for kind, baseline in self._baselines.items():
            self._run_baseline(kind, baseline, counts)

    def _run_baseline(self, kind: str, baseline: Baseline, counts: bool) -> None:
        marks = [self._watch.mark()]
        # as many as the engine has, so that both find the GPU equally warm
        for _ in self._blocks[kind]:
            baseline(self._inputs[kind])
            marks.append(self._watch.mark())
        seconds = self._watch.between(marks)
        if counts:
            self._baseline_seconds[kind] += seconds

    def kinds(self) -> tuple[KindTiming, ...]:
        """Summarize the passes that counted."""
        return tuple(
            KindTiming(
                kind=kind,
                blocks=len(entries),
                first_seconds=self._first[kind],
                engine=Spread.of(self._engine_seconds[kind]),
                baseline=Spread.of(self._baseline_seconds[kind]),
            )
            for kind, entries in self._blocks.items()
        )


def _free_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    return int(torch.cuda.mem_get_info(device)[0])
