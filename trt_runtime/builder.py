"""Builds an engine: reuses finished plans, resumes an interrupted build, stores block by block."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from .backend import Backend, Gpu, load_backend, probe_gpu
from .durations import START, build_work
from .errors import BUILD_NODE
from .errors.backend import EngineTargetError
from .errors.build import BuildSpecError, FormatTargetError
from .manifest import (
    MANIFEST,
    UNFINISHED,
    VARIANTS,
    EngineManifest,
    plan_files,
    variants_manifest,
    write_manifest,
)
from .plan import BuiltPlan
from .plan_build import PlanBuild
from .progress import Progress, Record, unrecorded
from .signature import BlockSignature, read_block_folder
from .spec import (
    BF16_MIN_SM,
    FP4_TARGETS,
    FP8_ATTENTION_MIN_TOKENS,
    FP8_MIN_SM,
    BuildSpec,
)
from .store import locked, make_folder, remove
from .worker_pool import build_plans

logger = logging.getLogger(__name__)

_SHORTEST_SECONDS = 0.01


def build_engine(
    folder: Path,
    spec: BuildSpec,
    progress: Progress,
    workers: int = 1,
    record: Record = unrecorded,
) -> EngineManifest:
    """Build the plans of all block ONNX files in `folder` into `folder/<spec.folder_name>`.

    Plans whose ONNX, weights, library, targets and profile are unchanged are reused. The previous
    manifest stays in force until the new one is complete. A second process that builds the same
    engine waits for the first.

    Args:
        folder: A checkpoint's folder with its exported blocks.
        spec: What to build.
        progress: Called at least every 0.1 s while blocks are built; may raise to cancel.
        workers: Number of build processes, or `AUTOMATIC`. For a double block each takes 0.8 GB at
            FLUX.1's size in NVFP4 and 1.4 GB in bf16, at FLUX.2-dev's 1.7 GB in NVFP4 and 2.4 GB in
            FP8.
        record: Told how long each block took, and the rest.

    Raises:
        EngineError: any of the build errors; plans that were finished before are kept.
    """
    if workers < 0:
        raise BuildSpecError(
            f"{workers} build processes were asked for",
            "there must be 1 or more, or 0 for automatic",
            f"Enter another number of 'workers' in {BUILD_NODE}.",
        )
    backend = load_backend(spec.backend)
    signatures = read_block_folder(folder)
    _check_targets(backend, spec, signatures)
    _check_fp8_minimum(spec, signatures)
    engine_dir = folder / spec.folder_name
    make_folder(engine_dir)
    total = len(signatures)
    started = time.monotonic()
    with locked(engine_dir, lambda: progress("Waiting for another build of this engine", 0, total)):
        build = PlanBuild(engine_dir, spec, backend, signatures, progress, UNFINISHED)
        recorder = _Recorder(build, record)
        jobs = build.jobs((MANIFEST, UNFINISHED))
        first = next(jobs, None)
        if first is not None:
            processes = workers or build.automatic_workers()
            build_plans(chain((first,), jobs), processes, recorder.store, build.report)
            recorder.finish(min(processes, len(build.wanted)))
        manifest = build.manifest()
        _put_in_force(engine_dir, manifest)
    logger.info(
        "Built engine %s/%s: %s plans, %s reused, %.1f s",
        folder.name,
        engine_dir.name,
        total,
        total - len(build.wanted),
        time.monotonic() - started,
    )
    return manifest


class _Recorder:
    """Stores plans and tells how long they took; what is left of the time is the start."""

    def __init__(self, build: PlanBuild, record: Record) -> None:
        self._build, self._record = build, record
        self._signatures = {signature.block: signature for signature in build.signatures}
        self._started = time.monotonic()
        self._in_blocks = 0.0

    def store(self, plan: BuiltPlan) -> None:
        self._build.store(plan)
        signature = self._signatures[plan.block]
        fp4, fp8 = bool(signature.fp4_linears), bool(signature.fp8_linears)
        work = build_work(plan.block, fp4, fp8, signature.fp8_attention, self._build.spec)
        self._record(work, signature.weight_bytes, plan.build_seconds)
        self._in_blocks += plan.build_seconds

    def finish(self, processes: int) -> None:
        rest = time.monotonic() - self._started - self._in_blocks / processes
        # with blocks of unequal size not all processes are busy to the end
        self._record(START, 1, max(rest, _SHORTEST_SECONDS))


def _check_targets(backend: Backend, spec: BuildSpec, signatures: Sequence[BlockSignature]) -> None:
    for target in spec.targets:
        for signature in signatures:
            formats = BlockFormats(
                signature.block,
                bool(signature.fp4_linears),
                bool(signature.fp8_linears),
                signature.fp8_attention,
                signature.high_precision,
            )
            check_formats(target, formats)
    if not backend.chooses_targets:
        _check_own_gpu(spec, probe_gpu())


@dataclass(frozen=True)
class BlockFormats:
    """What a block has to be multiplied in.

    Attributes:
        block: Its name.
        has_fp4: Whether there are NVFP4 Linears.
        has_fp8: Whether there are FP8 Linears.
        fp8_attention: Whether attention is in FP8.
        high_precision: Type of everything else.
    """

    block: str
    has_fp4: bool
    has_fp8: bool
    fp8_attention: bool
    high_precision: str


def check_formats(target: str, formats: BlockFormats) -> None:
    """Refuse what a target's tensor cores cannot multiply.

    TensorRT-RTX 1.7 would refuse it after loading all weights: "HW-specific datatypes".

    Raises:
        FormatTargetError: it names the recipe or option to choose instead.
        BuildSpecError: the target runs no recipe at all.
    """
    sm = int(target.removeprefix("sm"))
    without_fp8 = sm < FP8_MIN_SM
    if formats.has_fp4 and target not in FP4_TARGETS:
        raise FormatTargetError(
            target,
            f"the NVFP4 weights of '{formats.block}'",
            f"one of {', '.join(FP4_TARGETS)}",
            f"recipe '{'bf16' if without_fp8 else 'fp8'}'",
        )
    if formats.has_fp8 and without_fp8:
        weights = f"the FP8 weights of '{formats.block}'"
        raise FormatTargetError(target, weights, f"sm{FP8_MIN_SM} or newer", "recipe 'bf16'")
    if formats.fp8_attention and without_fp8:
        attention = f"the FP8 attention of '{formats.block}'"
        raise FormatTargetError(
            target, attention, f"sm{FP8_MIN_SM} or newer", "switch off 'fp8 attention'"
        )
    if formats.high_precision == "bf16" and sm < BF16_MIN_SM:
        raise BuildSpecError(
            f"Target '{target}' cannot run bf16, which every recipe uses",
            f"sm{BF16_MIN_SM} or newer can",
            f"Choose another 'target' in {BUILD_NODE}.",
        )


def _check_fp8_minimum(spec: BuildSpec, signatures: Sequence[BlockSignature]) -> None:
    minimum = spec.profile.range("S").minimum
    if minimum < FP8_ATTENTION_MIN_TOKENS and any(s.fp8_attention for s in signatures):
        raise BuildSpecError(
            f"The profile starts at {minimum} image and text tokens",
            f"FP8 attention needs at least {FP8_ATTENTION_MIN_TOKENS} (a picture of 96x96 pixels "
            "has 36)",
            "Raise the minimum, or switch 'fp8 attention' off in 'Quantize FLUX to FP4'.",
        )


def _check_own_gpu(spec: BuildSpec, gpu: Gpu) -> None:
    """TensorRT without compute capability targets builds for the GPU in this machine only."""
    if gpu.problem:
        raise BuildSpecError(
            f"Backend '{spec.backend}' builds on the GPU that runs the plans",
            f"here is {gpu.problem}",
            f"Choose a 'target' without 'tensorrt-' in {BUILD_NODE} to build without a GPU.",
        )
    if spec.targets != (gpu.sm,):
        raise EngineTargetError(gpu.name, gpu.sm, spec.targets)


def _put_in_force(engine_dir: Path, manifest: EngineManifest) -> None:
    """Store the manifest of a finished build, then delete plans that no manifest needs any more."""
    write_manifest(engine_dir / MANIFEST, manifest)
    remove(engine_dir / UNFINISHED)
    variants = variants_manifest(engine_dir / VARIANTS, manifest)
    if variants is None:
        remove(engine_dir / VARIANTS)
    current = {entry.file for entry in (*manifest.blocks, *(variants.blocks if variants else ()))}
    for path in plan_files(engine_dir):
        if path.name not in current:
            remove(path)
