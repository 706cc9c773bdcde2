"""One run of the builder over some blocks: what can be reused, what must be built."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from .backend import Backend
from .digest import digest_of_fields, digest_of_file, digest_of_ranges
from .errors.engine import EngineMismatchError, ManifestInvalidError
from .manifest import (
    EngineManifest,
    PlanEntry,
    check_plan_size,
    plan_file_name,
    read_manifest_file,
    write_manifest,
)
from .plan import SETTINGS_VERSION, BuildJob, BuiltPlan
from .progress import Progress
from .resources import automatic_workers
from .signature import BlockSignature
from .spec import BuildSpec, ShapeProfile

logger = logging.getLogger(__name__)


class PlanBuild:
    """One run of the builder: which plans exist, which are wanted, what is stored so far."""

    def __init__(
        self,
        engine_dir: Path,
        spec: BuildSpec,
        backend: Backend,
        signatures: Sequence[BlockSignature],
        progress: Progress,
        record: str,
    ) -> None:
        """Prepare to build.

        Args:
            engine_dir: Where plans go; the caller holds its lock.
            spec: What to build.
            backend: The library.
            signatures: Of the blocks, in the order of the manifest.
            progress: Called at least every 0.1 s; may raise to cancel.
            record: File name of the manifest that every stored plan is added to.
        """
        self.record = record
        self.engine_dir, self.spec, self.backend = engine_dir, spec, backend
        self.signatures, self.progress = signatures, progress
        self.entries: dict[str, PlanEntry] = {}
        self.wanted: dict[str, PlanEntry] = {}
        self._unseen: dict[str, PlanEntry] = {}

    def jobs(self, records: Sequence[str]) -> Iterator[BuildJob]:
        """Take over every finished plan with the same key; yield jobs for the others.

        Block after block, as its digests are known: the first ones are built meanwhile.

        Args:
            records: File names of the manifests to look in.
        """
        known = {entry.key: entry for name in records for entry in self._known(name)}
        # a cancelled build must not forget plans that it did not come to
        self._unseen = {entry.block: entry for entry in self._known(self.record)}
        for signature in self.signatures:
            self.report(signature.block, "Checking")
            wanted = self._wanted(signature)
            self._unseen.pop(signature.block, None)
            entry = known.get(wanted.key)
            if entry is not None and self._is_intact(entry):
                self.entries[signature.block] = entry
            else:
                self.wanted[signature.block] = wanted
                plan = self.engine_dir / wanted.file
                yield block_job(signature, plan, self.backend, self.spec)

    def automatic_workers(self) -> int:
        """Return how many of the blocks that are not reused this machine can build side by side."""
        weights = (s.weight_bytes for s in self.signatures if s.block not in self.entries)
        return automatic_workers(max(weights, default=0))

    def store(self, plan: BuiltPlan) -> None:
        """Record a stored plan, so that the next build resumes after it."""
        wanted = self.wanted[plan.block]
        self.entries[plan.block] = wanted.model_copy(update=asdict(plan))
        write_manifest(self.engine_dir / self.record, self.manifest())
        self.report(plan.block, "Built")

    def report(self, blocks: str, phase: str = "Building") -> None:
        """Tell what is being done."""
        self.progress(f"{phase} {blocks}", len(self.entries), len(self.signatures))

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

    def manifest(self) -> EngineManifest:
        """Return a manifest of the plans that are stored so far."""
        first = self.signatures[0]
        entries = {**self._unseen, **self.entries}
        order = [s.block for s in self.signatures if s.block in entries]
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
            blocks=tuple(entries[block] for block in order),
        )


def block_job(signature: BlockSignature, plan: Path, backend: Backend, spec: BuildSpec) -> BuildJob:
    """Return the job of a worker that builds one block.

    Args:
        signature: Of its ONNX file.
        plan: The file to write.
        backend: The library.
        spec: Targets and profile.
    """
    return BuildJob(
        block=signature.block,
        backend=backend.name,
        onnx=str(signature.path.resolve()),
        plan=str(plan.resolve()),
        targets=spec.targets,
        profile=profile_shapes(signature, spec.profile),
        fp4_linears=signature.fp4_linears,
        fp8_linears=signature.fp8_linears,
        fp8_attention=signature.fp8_attention,
    )


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
