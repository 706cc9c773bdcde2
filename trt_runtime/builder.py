"""Builds an engine: reuses finished plans, resumes an interrupted build, stores block by block."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from .backend import Backend, Gpu, load_backend, probe_gpu
from .digest import digest_of_fields, digest_of_file, digest_of_ranges
from .errors import (
    BuildSpecError,
    EngineMismatchError,
    EngineTargetError,
    FormatTargetError,
    ManifestInvalidError,
)
from .manifest import (
    MANIFEST,
    UNFINISHED,
    EngineManifest,
    PlanEntry,
    check_plan_size,
    plan_file_name,
    plan_files,
    read_manifest_file,
    write_manifest,
)
from .plan import SETTINGS_VERSION, BuildJob, BuiltPlan
from .progress import Progress
from .signature import BlockSignature, read_block_folder
from .spec import (
    BF16_MIN_SM,
    FP4_TARGETS,
    FP8_ATTENTION_MIN_TOKENS,
    FP8_MIN_SM,
    BuildSpec,
    ShapeProfile,
)
from .store import locked, remove_temporaries
from .worker_process import build_plans

logger = logging.getLogger(__name__)


def build_engine(
    folder: Path, spec: BuildSpec, progress: Progress, workers: int = 1
) -> EngineManifest:
    """Build the plans of all block ONNX files in `folder` into `folder/<spec.folder_name>`.

    Plans whose ONNX, weights, library, targets and profile are unchanged are reused. The previous
    manifest stays in force until the new one is complete. A second process that builds the same
    engine waits for the first.

    Args:
        folder: A checkpoint's folder with its exported blocks.
        spec: What to build.
        progress: Called at least every 0.1 s while blocks are built; may raise to cancel.
        workers: Number of build processes. For a double block each takes 0.8 GB at FLUX.1's size
            in NVFP4 and 1.4 GB in bf16, at FLUX.2-dev's 1.7 GB in NVFP4 and 2.4 GB in FP8.

    Raises:
        EngineError: any of the build errors; plans that were finished before are kept.
    """
    if workers < 1:
        raise BuildSpecError(f"{workers} build processes were asked for; use at least 1.")
    backend = load_backend(spec.backend)
    signatures = read_block_folder(folder)
    _check_targets(backend, spec, signatures)
    _check_fp8_minimum(spec, signatures)
    engine_dir = folder / spec.folder_name
    engine_dir.mkdir(exist_ok=True)
    total = len(signatures)
    started = time.monotonic()
    with locked(engine_dir, lambda: progress("Waiting for another build of this engine", 0, total)):
        remove_temporaries(engine_dir)
        build = _Build(engine_dir, spec, backend, signatures, progress)
        jobs = build.reuse()
        build_plans(jobs, workers, build.store, build.report)
        manifest = build.finish()
    logger.info(
        "Built engine %s/%s: %s plans, %s reused, %.1f s",
        folder.name,
        engine_dir.name,
        total,
        total - len(jobs),
        time.monotonic() - started,
    )
    return manifest


def profile_shapes(
    signature: BlockSignature, profile: ShapeProfile
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Return (min, opt, max) shapes of every input that has a dynamic axis."""
    shapes = {}
    for spec in signature.inputs:
        bounds = [
            profile.bounds(dim) if isinstance(dim, str) else (dim, dim, dim) for dim in spec.shape
        ]
        if any(isinstance(dim, str) for dim in spec.shape):
            minimum, optimum, maximum = zip(*bounds, strict=True)
            shapes[spec.name] = (minimum, optimum, maximum)
    return shapes


def plan_key(onnx_digest: str, weights_digest: str, backend: Backend, spec: BuildSpec) -> str:
    """Return the digest of everything that decides a plan's bytes."""
    return digest_of_fields(
        {
            "onnx": onnx_digest,
            "weights": weights_digest,
            "backend": [backend.name, backend.version],
            "targets": spec.targets,
            "profile": asdict(spec.profile),
            "settings": SETTINGS_VERSION,
        }
    )


def _check_targets(backend: Backend, spec: BuildSpec, signatures: Sequence[BlockSignature]) -> None:
    for target in spec.targets:
        for signature in signatures:
            check_formats(target, signature)
    if not backend.chooses_targets:
        _check_own_gpu(spec, probe_gpu())


def check_formats(target: str, signature: BlockSignature) -> None:
    """Refuse what a target's tensor cores cannot multiply.

    TensorRT-RTX 1.7 would refuse it after loading all weights: "HW-specific datatypes".

    Raises:
        FormatTargetError: it names the recipe or option to choose instead.
        BuildSpecError: the target runs no recipe at all.
    """
    sm = int(target.removeprefix("sm"))
    without_fp8 = sm < FP8_MIN_SM
    if signature.fp4_linears and target not in FP4_TARGETS:
        raise FormatTargetError(
            target,
            f"the NVFP4 weights of '{signature.block}'",
            f"one of {', '.join(FP4_TARGETS)}",
            f"recipe '{'bf16' if without_fp8 else 'fp8'}'",
        )
    if signature.fp8_linears and without_fp8:
        weights = f"the FP8 weights of '{signature.block}'"
        raise FormatTargetError(target, weights, f"sm{FP8_MIN_SM} or newer", "recipe 'bf16'")
    if signature.fp8_attention and without_fp8:
        attention = f"the FP8 attention of '{signature.block}'"
        raise FormatTargetError(
            target, attention, f"sm{FP8_MIN_SM} or newer", "switch FP8 attention off"
        )
    if signature.high_precision == "bf16" and sm < BF16_MIN_SM:
        raise BuildSpecError(
            f"Target '{target}' cannot run bf16, which every recipe uses; choose sm{BF16_MIN_SM} "
            "or newer."
        )


def _check_fp8_minimum(spec: BuildSpec, signatures: Sequence[BlockSignature]) -> None:
    minimum = spec.profile.range("S").minimum
    if minimum < FP8_ATTENTION_MIN_TOKENS and any(s.fp8_attention for s in signatures):
        raise BuildSpecError(
            f"The profile starts at {minimum} image and text tokens; FP8 attention needs at least "
            f"{FP8_ATTENTION_MIN_TOKENS} (an image of 96x96 pixels has 36). Raise the minimum, or "
            "quantize without FP8 attention."
        )


def _check_own_gpu(spec: BuildSpec, gpu: Gpu) -> None:
    """TensorRT without compute capability targets builds for the GPU in this machine only."""
    if gpu.problem:
        raise BuildSpecError(
            f"Backend '{spec.backend}' builds on the GPU that runs the plans, but here is "
            f'{gpu.problem}. Choose backend "tensorrt_rtx" to build without a GPU.'
        )
    if spec.targets != (gpu.sm,):
        raise EngineTargetError(gpu.name, gpu.sm, spec.targets)


class _Build:
    """One run of build_engine: which plans exist, which are wanted, what is stored so far."""

    def __init__(
        self,
        engine_dir: Path,
        spec: BuildSpec,
        backend: Backend,
        signatures: Sequence[BlockSignature],
        progress: Progress,
    ) -> None:
        self.engine_dir, self.spec, self.backend = engine_dir, spec, backend
        self.signatures, self.progress = signatures, progress
        self.entries: dict[str, PlanEntry] = {}
        self.wanted: dict[str, PlanEntry] = {}

    def reuse(self) -> list[BuildJob]:
        """Take over every finished plan with the same key; return jobs for the others."""
        known = {entry.key: entry for name in (MANIFEST, UNFINISHED) for entry in self._known(name)}
        jobs = []
        for signature in self.signatures:
            self.report(signature.block, "Checking")
            wanted = self._wanted(signature)
            entry = known.get(wanted.key)
            if entry is not None and self._is_intact(entry):
                self.entries[signature.block] = entry
            else:
                self.wanted[signature.block] = wanted
                jobs.append(self._job(signature, wanted))
        return jobs

    def store(self, plan: BuiltPlan) -> None:
        """Record a stored plan, so that the next build resumes after it."""
        wanted = self.wanted[plan.block]
        self.entries[plan.block] = wanted.model_copy(update=asdict(plan))
        write_manifest(self.engine_dir / UNFINISHED, self._manifest())
        self.report(plan.block, "Built")

    def report(self, blocks: str, phase: str = "Building") -> None:
        """Tell what is being done."""
        self.progress(f"{phase} {blocks}", len(self.entries), len(self.signatures))

    def finish(self) -> EngineManifest:
        """Put the new manifest in force, then delete plans that no manifest needs any more."""
        manifest = self._manifest()
        write_manifest(self.engine_dir / MANIFEST, manifest)
        (self.engine_dir / UNFINISHED).unlink(missing_ok=True)
        current = {entry.file for entry in manifest.blocks}
        for path in plan_files(self.engine_dir):
            if path.name not in current:
                path.unlink()
        return manifest

    def _known(self, name: str) -> tuple[PlanEntry, ...]:
        path = self.engine_dir / name
        if not path.is_file():
            return ()
        try:
            return read_manifest_file(path).blocks
        except ManifestInvalidError as error:
            logger.warning("No plan of the earlier build is reused: %s", error)
            return ()

    def _is_intact(self, entry: PlanEntry) -> bool:
        try:
            check_plan_size(self.engine_dir, entry)
        except EngineMismatchError as error:
            logger.warning("Block %s is built again: %s", entry.block, error)
            return False
        if digest_of_file(self.engine_dir / entry.file) != entry.digest:
            logger.warning("Block %s is built again: its plan was changed", entry.block)
            return False
        return True

    def _wanted(self, signature: BlockSignature) -> PlanEntry:
        onnx_digest = digest_of_file(signature.path)
        ranges = [(entry.offset, entry.length) for entry in signature.ranges]
        weights_digest = (
            digest_of_ranges(signature.weights, ranges) if signature.weights else "0" * 64
        )
        key = plan_key(onnx_digest, weights_digest, self.backend, self.spec)
        return PlanEntry(
            block=signature.block,
            kind="double" if signature.kind == "double" else "single",
            file=plan_file_name(signature.block, key),
            key=key,
            onnx_digest=onnx_digest,
            weights_digest=weights_digest,
            inputs=signature.inputs,
            outputs=signature.outputs,
            # known once the plan is built
            bytes=0,
            digest="0" * 64,
            fp4_gemms_expected=0,
            fp4_gemms_found=0,
            fp8_gemms_expected=0,
            fp8_gemms_found=0,
            fp8_mha_expected=0,
            fp8_mha_found=0,
            activation_bytes=0,
            build_seconds=0,
        )

    def _job(self, signature: BlockSignature, wanted: PlanEntry) -> BuildJob:
        return BuildJob(
            block=signature.block,
            backend=self.backend.name,
            onnx=str(signature.path.resolve()),
            plan=str((self.engine_dir / wanted.file).resolve()),
            targets=self.spec.targets,
            profile=profile_shapes(signature, self.spec.profile),
            fp4_linears=signature.fp4_linears,
            fp8_linears=signature.fp8_linears,
            fp8_attention=signature.fp8_attention,
        )

    def _manifest(self) -> EngineManifest:
        first = self.signatures[0]
        order = [s.block for s in self.signatures if s.block in self.entries]
        return EngineManifest(
            backend=self.backend.name,  # type: ignore[arg-type]  # a str that BuildSpec has checked
            backend_version=self.backend.version,
            builder_platform=platform.system().lower(),
            builder_python=platform.python_version(),
            targets=self.spec.targets,
            profile=replace(self.spec.profile),
            checkpoint_digest=first.checkpoint_digest,
            recipe=first.recipe,
            hidden_size=first.hidden_size,
            num_heads=first.num_heads,
            high_precision=first.high_precision,  # type: ignore[arg-type]
            depth=first.depth,
            depth_single_blocks=first.depth_single_blocks,
            blocks=tuple(self.entries[block] for block in order),
        )
