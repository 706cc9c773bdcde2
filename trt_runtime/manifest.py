"""manifest.json: what an engine consists of, and the checks before anything of it is used."""

from __future__ import annotations

import logging
import mmap
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .backend import Backend
from .contract import (
    BLOCK_NAME,
    HIGH_PRECISION,
    OUTPUTS,
    TensorSpec,
    block_names,
    has_factor_shape,
    has_possible_shape,
    input_names,
)
from .digest import digest_of_bytes, digest_of_file
from .errors.backend import EngineVersionError
from .errors.engine import (
    EngineStaleError,
    ManifestInvalidError,
    ManifestMissingError,
    PlanDigestError,
    PlanMissingError,
    PlanTruncatedError,
)
from .part_times import PartTimes
from .spec import BuildSpec, ShapeProfile
from .store import write_atomic

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
UNFINISHED = "build.json"
"""A manifest of the blocks that an unfinished build has stored; same format."""

VARIANTS = "variants.json"
"""A manifest of the variants that were needed so far; same format."""

BAKED = "baked.json"
"""A manifest of changed blocks that stand for an engine's own; same format."""

MAX_MANIFEST_BYTES = 8 << 20
KEY_DIGITS = 12
PLAN_NAME = re.compile(rf"({BLOCK_NAME.pattern})-[0-9a-f]{{{KEY_DIGITS}}}\.plan")

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=1 << 50)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class PlanEntry(_Strict):
    """One block's plan."""

    block: Annotated[str, Field(pattern=f"^{BLOCK_NAME.pattern}$")]
    kind: Literal["double", "single"]
    file: str
    bytes: Count
    digest: Digest
    key: Digest
    """Digest of everything the plan was built from; it names the file."""
    onnx_digest: Digest
    weights_digest: Digest
    fp4_gemms_expected: Count
    fp4_gemms_found: Count
    fp8_gemms_expected: Count
    fp8_gemms_found: Count
    fp8_mha_expected: Count
    fp8_mha_found: Count
    activation_bytes: Count
    """Builder-reported, at the profile's maximum."""
    build_seconds: Annotated[float, Field(ge=0)]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @model_validator(mode="after")
    def _shapes_and_file_are_of_this_block(self) -> PlanEntry:
        for specs, names, what in (
            (self.inputs, input_names(self.block, self.kind), "inputs"),
            (self.outputs, OUTPUTS[self.kind], "outputs"),
        ):
            if sorted(spec.name for spec in specs) != sorted(names):
                raise ValueError(f"the {what} are not those of '{self.block}'")
        for spec in (*self.inputs, *self.outputs):
            if not (has_possible_shape(spec) and has_factor_shape(spec)):
                raise ValueError(f"'{spec.name}' has the shape {reprlib.repr(list(spec.shape))}")
            if spec.dtype not in HIGH_PRECISION:
                raise ValueError(f"'{spec.name}' has the type {reprlib.repr(spec.dtype)}")
        expected = plan_file_name(self.block, self.key)
        if self.file != expected:
            # also refuses every path: separators cannot occur in the expected name
            raise ValueError(f"file '{self.file}' is not '{expected}'")
        return self


class EngineManifest(_Strict):
    """Everything known about an engine without opening a plan."""

    format_version: Literal[2] = 2
    backend: Literal["tensorrt_rtx", "tensorrt"]
    backend_version: str
    builder_platform: str
    builder_python: str
    targets: tuple[Annotated[str, Field(pattern=r"^sm[0-9]{2,3}$")], ...]
    profile: ShapeProfile
    checkpoint_digest: str
    recipe: str
    hidden_size: Count
    num_heads: Count
    high_precision: Literal["bf16", "fp16", "fp32"]
    depth: Annotated[int, Field(ge=0, le=9999)]
    depth_single_blocks: Annotated[int, Field(ge=0, le=9999)]
    blocks: tuple[PlanEntry, ...]

    @property
    def expected_blocks(self) -> tuple[str, ...]:
        """Names of all blocks in the order they run."""
        return block_names(self.depth, self.depth_single_blocks)

    @property
    def spec(self) -> BuildSpec:
        """What the engine was built for."""
        return BuildSpec(self.backend, self.targets, self.profile)

    @property
    def plan_bytes(self) -> int:
        """Size of all plans."""
        return sum(entry.bytes for entry in self.blocks)

    def is_variant_of(self, engine: EngineManifest) -> bool:
        """Tell whether plans described here can stand in for those of an engine."""
        fields = ("backend", "backend_version", "targets", "profile", "checkpoint_digest")
        return all(getattr(self, field) == getattr(engine, field) for field in fields)

    @property
    def built_with(self) -> str:
        """Library and version for messages."""
        return f"{self.backend} {self.backend_version}"


def plan_file_name(block: str, key: str) -> str:
    """Return the file name of a plan."""
    return f"{block}-{key[:KEY_DIGITS]}.plan"


def plan_files(engine_dir: Path) -> Iterator[Path]:
    """Yield the plan files in a folder, whether a manifest knows them or not."""
    return (p for p in sorted(engine_dir.glob("*.plan")) if PLAN_NAME.fullmatch(p.name))


def load_manifest(engine_dir: Path) -> EngineManifest:
    """Read and check an engine's manifest; no plan is opened.

    Raises:
        ManifestMissingError: there is none, or only that of an unfinished build.
        ManifestInvalidError: a field is unknown, missing or not allowed, or a block is missing.
    """
    path = engine_dir / MANIFEST
    if not path.is_file():
        plans = sum(1 for _ in plan_files(engine_dir)) if engine_dir.is_dir() else 0
        raise ManifestMissingError(engine_dir, plans, (engine_dir / UNFINISHED).is_file())
    manifest = read_manifest_file(path)
    blocks = tuple(entry.block for entry in manifest.blocks)
    if blocks != manifest.expected_blocks:
        wrong = sorted(set(blocks) ^ set(manifest.expected_blocks)) or ["their order"]
        raise ManifestInvalidError(path, "blocks", f"missing, repeated or unexpected: {wrong[0]}")
    return manifest


def read_manifest_file(path: Path) -> EngineManifest:
    """Parse one manifest, finished or not.

    Raises:
        ManifestInvalidError: a field is unknown, missing or not allowed.
    """
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ManifestInvalidError(path, "file", f"larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        return EngineManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        raise ManifestInvalidError(path, field, first["msg"]) from error


def variants_manifest(path: Path, engine: EngineManifest) -> EngineManifest | None:
    """Return a manifest of plans that belong to an engine; None if there is none of that engine."""
    if not path.is_file():
        return None
    try:
        variants = read_manifest_file(path)
    except ManifestInvalidError as error:
        logger.warning("These plans are built again: %s", error)
        return None
    return variants if variants.is_variant_of(engine) else None


def write_manifest(path: Path, manifest: EngineManifest) -> None:
    """Store a manifest atomically."""
    write_atomic(path, manifest.model_dump_json(indent=1).encode())


def verify_engine(engine_dir: Path, manifest: EngineManifest, backend: Backend | None) -> None:
    """Check plans, sources and library before anything is deserialized; nothing is changed on disk.

    Args:
        engine_dir: Folder of the plans; the ONNX files are in its parent.
        manifest: Its manifest.
        backend: The library that will run the plans, or None when they will not be run.

    Raises:
        EngineVersionError: the plans were built with another library release.
        PlanMissingError, PlanTruncatedError, PlanDigestError: a plan is not the one of the
            manifest.
        EngineStaleError: an ONNX file changed since the build.
    """
    times = PartTimes()
    with times.part("ONNX files"):
        check_engine(engine_dir, manifest, backend)
    with times.part("digests of plans"):
        for entry in manifest.blocks:
            check_plan_digest(engine_dir, entry)
    size = sum(entry.bytes for entry in manifest.blocks) / 1e9
    logger.info("Checked %d plans, %.1f GB, in %s", len(manifest.blocks), size, times)


def check_engine(engine_dir: Path, manifest: EngineManifest, backend: Backend | None) -> None:
    """Check as ``verify_engine`` does, but of the plans only whether they are there in full size.

    Raises:
        EngineVersionError, PlanMissingError, PlanTruncatedError, EngineStaleError: as there.
    """
    if backend is not None and (backend.name, backend.version) != (
        manifest.backend,
        manifest.backend_version,
    ):
        raise EngineVersionError(manifest.built_with, backend.label)
    for entry in manifest.blocks:
        check_onnx(engine_dir, entry)
        check_plan_size(engine_dir, entry)


def check_plan_digest(engine_dir: Path, entry: PlanEntry) -> None:
    """Raise PlanDigestError when a plan is another than its manifest describes."""
    if digest_of_file(engine_dir / entry.file) != entry.digest:
        raise _wrong_digest(entry)


def check_onnx(engine_dir: Path, entry: PlanEntry) -> None:
    """Raise EngineStaleError when the block's ONNX file is not the one the plan was built from.

    Without ONNX files the plans stand alone: then there is nothing to compare.
    """
    onnx = engine_dir.parent / f"{entry.block}.onnx"
    if onnx.is_file() and digest_of_file(onnx) != entry.onnx_digest:
        raise EngineStaleError(entry.file, f"is older than '{onnx.name}', which was exported again")


def check_plan_size(engine_dir: Path, entry: PlanEntry) -> None:
    """Raise when a plan is missing or has another size than its manifest says."""
    path = engine_dir / entry.file
    if path.is_symlink() or not path.is_file():
        raise PlanMissingError(entry.file, "is missing")
    size = path.stat().st_size
    if not size:
        raise PlanTruncatedError(entry.file, "is empty")
    if size != entry.bytes:
        raise PlanTruncatedError(entry.file, f"has {size} bytes, its manifest says {entry.bytes}")


def check_plan(engine_dir: Path, entry: PlanEntry) -> mmap.mmap:
    """Return a plan, mapped and checked.

    Plans are replaced, never written to, so a mapping keeps what was checked.
    """
    check_plan_size(engine_dir, entry)
    with (engine_dir / entry.file).open("rb") as file:
        plan = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if digest_of_bytes(plan) != entry.digest:
        raise _wrong_digest(entry)
    return plan


def _wrong_digest(entry: PlanEntry) -> PlanDigestError:
    return PlanDigestError(entry.file, "is not the plan that its manifest describes (wrong digest)")
