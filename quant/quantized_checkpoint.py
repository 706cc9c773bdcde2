"""The quantized checkpoint: one safetensors file that every later stage reads by byte ranges.

Per block Linear in NVFP4: ``weight`` U8 ``[N, K/2]`` (two E2M1 codes a byte, even element low),
``weight_scale`` F8_E4M3 ``[N, K/16]``, ``weight_scale_2`` and ``input_scale`` F32 scalars, and
where the recipe says so ``pre_quant_scale`` ``[K]``, ``svd_down`` ``[r, K]`` and ``svd_up``
``[N, r]``. In FP8: ``weight`` F8_E4M3 ``[N, K]``, ``weight_scale`` F32 ``[N]``, ``input_scale`` F32
scalar. With FP8 attention each block has ``attention.q_scale``, ``.k_scale`` and ``.v_scale``.
Modulation may be stored in ComfyUI's own quantized layouts. Everything else keeps its name and a
high-precision dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from .errors.files import QuantizedCheckpointError
from .flux.config import FluxConfig, block_linears
from .plan_tensors import plan_tensor_fault, stored_format
from .recipe import Format, QuantizeOptions
from .safetensors_header import StoredTensor, read_header

if TYPE_CHECKING:
    from torch import Tensor

    from .sources.source import FluxSource

METADATA_KEY = "flux_fp4"


class LinearReport(BaseModel):
    """What quantization did to one Linear.

    Attributes:
        name: Full name, for example ``double_blocks.0.img_attn.qkv``.
        format: What it is stored in.
        weight_sqnr_db: Of the weight against the source weight.
        output_sqnr_db: Of the Linear's output with quantized weight and input, over some of the
            calibration samples.
        input_amax: Largest input magnitude seen in calibration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    format: Format
    weight_sqnr_db: float
    output_sqnr_db: float
    input_amax: float


class TrainingReport(BaseModel):
    """What training did to one block, on samples that it did not learn from.

    Attributes:
        before_db: SQNR of the block's output, behind quantized blocks, before training.
        after_db: After training. Not above ``before_db``: the untrained block was kept.
        steps: How long it was trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    before_db: float
    after_db: float
    steps: int

    @property
    def helped(self) -> bool:
        """Whether the trained block is the better one, and was kept."""
        return self.after_db > self.before_db


class BlockReport(BaseModel):
    """SQNR of what one block adds to its input, all its quantization taken together.

    Attributes:
        name: Of the block.
        update_sqnr_db: Behind blocks in full precision, in dB.
        training: None for a recipe without training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    update_sqnr_db: float
    training: TrainingReport | None = None


class DistillationReport(BaseModel):
    """How all blocks together were trained against the original, after they were quantized.

    Attributes:
        steps: How long.
        best_step: Steps before the state that was kept: the best for the held-out prompts.
        batch: Samples of each step.
        samples: Points of trajectories that were learned from.
        held_out: Prompts that were not.
        before_db: SQNR of the velocity for these prompts, against the original's, before.
        after_db: Afterwards.
        base_digest: Content digest of the checkpoint that was trained.
        job_digest: Of everything that the result depends on, but for rounding of the machines.
        reports: Whether the reports on Linears and blocks were measured again, or are those of that
            checkpoint, because the statistics of its calibration were gone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int
    best_step: int
    batch: int
    samples: int
    held_out: int
    before_db: float
    after_db: float
    base_digest: str
    job_digest: str
    reports: Literal["measured", "carried"]


class QuantizedMetadata(BaseModel):
    """What the header says about the file.

    Attributes:
        format_version: Of this layout.
        variant: FLUX model, for example ``flux1-dev``.
        config: The transformer's sizes.
        options: How it was quantized.
        high_precision: Type of everything that is not quantized inside a plan.
        calibration_digest: Of the calibration samples.
        calibration_samples: How many there were.
        calibration_seed: Of their noise; None if there are none.
        calibration_timesteps: Noise levels of each picture.
        velocity_sqnr_db: How well the model in full precision predicts the velocity of the
            calibration samples: about 0 dB for a model that predicts nothing. None if unknown.
        source_name: File name of the source checkpoint.
        source_layout: How that stores its tensors.
        source_bytes: Its size.
        source_digest: ``FluxSource.digest`` of it.
        content_digest: blake3 over names and bytes of every tensor here.
        linears: Report by Linear.
        blocks: Report by block.
        base_digest: Only in a file of changed blocks: content digest of the checkpoint in which
            they stand for the blocks of the same name. The file has no others, and nothing of what
            stays outside of plans.
        distillation: None for a checkpoint that was quantized only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[2] = 2
    variant: str
    config: FluxConfig
    options: QuantizeOptions
    high_precision: Literal["bf16", "fp16", "fp32"]
    calibration_digest: str
    calibration_samples: int
    calibration_seed: int | None
    calibration_timesteps: int
    velocity_sqnr_db: float | None
    source_name: str
    source_layout: str
    source_bytes: int = Field(ge=1, le=1 << 50)
    source_digest: str
    content_digest: str
    linears: tuple[LinearReport, ...]
    blocks: tuple[BlockReport, ...]
    base_digest: str | None = None
    distillation: DistillationReport | None = None

    @property
    def block_names(self) -> tuple[str, ...]:
        """Names of the blocks in the file, in the order they run."""
        if self.base_digest is None:
            return self.config.block_names
        return tuple(report.name for report in self.blocks)

    @property
    def recipe(self) -> str:
        """Name of the recipe, with what was done after it."""
        name = self.options.recipe.name
        return name if self.distillation is None else f"{name}-qad"

    @property
    def fp8_attention(self) -> bool:
        """Whether q, k and v scales are present."""
        return self.options.fp8_attention


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """The header of a quantized checkpoint.

    Attributes:
        path: The file.
        metadata: What it says of itself.
        tensors: Place of every tensor by name.
    """

    path: Path
    metadata: QuantizedMetadata
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def read(cls, path: Path) -> QuantizedCheckpoint:
        """Read and check the header; no tensor is loaded.

        Raises:
            QuantizedCheckpointError: Not a safetensors file, not ours, or incomplete.
        """
        try:
            header = read_header(path)
        except (SafetensorError, OSError) as error:
            raise QuantizedCheckpointError(path.name, f"it cannot be read ({error})") from error
        metadata = _parsed_metadata(path.name, header.metadata)
        checkpoint = cls(path, metadata, header.tensors)
        checkpoint._check_blocks()
        checkpoint._check_complete()
        fault = plan_tensor_fault(
            checkpoint.tensors,
            metadata.config,
            metadata.block_names,
            metadata.high_precision,
            metadata.fp8_attention,
        )
        if fault is not None:
            raise QuantizedCheckpointError(path.name, fault)
        return checkpoint

    @property
    def name(self) -> str:
        """The model's name: the file's without suffix."""
        return self.path.stem

    def load(self, name: str) -> Tensor:
        """Load one tensor in its stored dtype."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    def block_tensors(self, block: str) -> dict[str, Tensor]:
        """Load every tensor of a block, by names relative to it."""
        start = f"{block}."
        with safe_open(self.path, framework="pt") as file:
            return {
                name[len(start) :]: file.get_tensor(name)
                for name in self.tensors
                if name.startswith(start)
            }

    def linear_tensors(self, linear: str, weight: bool = True) -> dict[str, Tensor]:
        """Load the tensors of one Linear, by names relative to its block.

        Args:
            linear: Full name, for example ``single_blocks.0.linear1``.
            weight: Whether the weight itself and its scales are wanted too.
        """
        stack, index, _ = linear.split(".", 2)
        start = f"{stack}.{index}."
        wanted = [name for name in self.tensors if name.startswith(f"{linear}.")]
        if not weight:
            wanted = [name for name in wanted if name.removeprefix(f"{linear}.") in BESIDE_WEIGHT]
        with safe_open(self.path, framework="pt") as file:
            return {name.removeprefix(start): file.get_tensor(name) for name in wanted}

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """Return ``(N, K)`` of a block Linear."""
        rows, columns = self.tensors[f"{linear}.weight"].shape
        return rows, 2 * columns if self.linear_format(linear) == "nvfp4" else columns

    def high_precision_state_dict(self) -> dict[str, Tensor]:
        """Load what stays outside of plans: embedders, modulation and final layer."""
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in self.tensors if not is_in_plan(name)}

    def linear_format(self, linear: str) -> Format:
        """Tell a block Linear's format from its stored dtype."""
        return stored_format(self.tensors[f"{linear}.weight"])

    def was_made_from(self, source_digest: str, options: QuantizeOptions, calibration: str) -> bool:
        """Tell whether quantizing again with these inputs would write the same file."""
        metadata = self.metadata
        return (
            metadata.source_digest == source_digest
            and metadata.options == options
            and metadata.calibration_digest == calibration
            and metadata.distillation is None
        )

    def _check_blocks(self) -> None:
        blocks = self.metadata.block_names
        unknown = set(blocks) - set(self.metadata.config.block_names)
        if unknown or len(set(blocks)) != len(blocks):
            reason = f"it lists blocks twice or that the model has not: {sorted(unknown)[:3]}"
            raise QuantizedCheckpointError(self.path.name, reason)

    def _check_complete(self) -> None:
        missing = sorted(self._needed() - set(self.tensors))
        if missing:
            reason = f"it lacks {len(missing)} quantized tensors (first: '{missing[0]}')"
            raise QuantizedCheckpointError(self.path.name, reason)

    def _needed(self) -> set[str]:
        needed = set()
        for block in self.metadata.block_names:
            for linear in (f"{block}.{part}" for part in block_linears(block)):
                needed.add(f"{linear}.weight")
                if f"{linear}.weight" in self.tensors:
                    parts = FORMAT_PARTS[self.linear_format(linear)]
                    needed |= {f"{linear}.{part}" for part in parts}
            if self.metadata.fp8_attention:
                needed |= {f"{block}.attention.{part}_scale" for part in ("q", "k", "v")}
        return needed


def up_to_date_checkpoint(
    source: FluxSource, destination: Path, options: QuantizeOptions, calibration: str | None
) -> QuantizedCheckpoint | None:
    """Return the quantized checkpoint at `destination` if quantizing again would change nothing.

    Args:
        source: The weights.
        destination: The quantized checkpoint, which may not exist.
        options: How it should be quantized.
        calibration: Digest of the samples; None accepts any samples.
    """
    from .checkpoint_writer import remove_leftovers

    if not destination.is_file():
        return None
    checkpoint = QuantizedCheckpoint.read(destination)
    digest = checkpoint.metadata.calibration_digest if calibration is None else calibration
    if not checkpoint.was_made_from(source.digest(), options, digest):
        return None
    remove_leftovers(destination)
    return checkpoint


FORMAT_PARTS: dict[Format, tuple[str, ...]] = {
    "nvfp4": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "fp8": ("weight", "weight_scale", "input_scale"),
    "bf16": ("weight",),
}
"""Tensors that a Linear of each format always has, besides its bias."""


BESIDE_WEIGHT = ("pre_quant_scale", "svd_down", "svd_up")
"""Small tensors of a Linear that act on its input or beside its GEMM."""


def is_in_plan(tensor: str) -> bool:
    """Tell whether a tensor belongs to a block plan: any block tensor but modulation."""
    in_block = tensor.startswith(("double_blocks.", "single_blocks."))
    modulation = (".img_mod.", ".txt_mod.", ".modulation.")
    return in_block and not any(part in tensor for part in modulation)


def _parsed_metadata(name: str, metadata: Mapping[str, str]) -> QuantizedMetadata:
    if METADATA_KEY not in metadata:
        raise QuantizedCheckpointError(name, "its header has no 'flux_fp4' entry")
    try:
        return QuantizedMetadata.model_validate_json(metadata[METADATA_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = f"its header is not of this version ({where}: {first['msg']})"
        raise QuantizedCheckpointError(name, reason) from error


def finite_or_limit(db: float) -> float:
    """Return ``db`` for a JSON header, which has no infinity: no noise at all counts as 200 dB."""
    return db if math.isfinite(db) else math.copysign(200.0, db)
