"""The quantized checkpoint: one safetensors file that every later stage reads by byte ranges.

Per quantized Linear: ``weight`` U8 ``[N, K/2]`` (two E2M1 codes a byte, even element low),
``weight_scale`` F8_E4M3 ``[N, K/16]``, ``weight_scale_2`` and ``input_scale`` F32 scalars. With
FP8 attention each block has ``attention.q_scale``, ``.k_scale`` and ``.v_scale``. Everything else
keeps its name and a high-precision dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import QuantizedCheckpointError
from .flux.config import FluxConfig, block_linears
from .recipe import QuantizeOptions
from .safetensors_header import StoredTensor, read_header

METADATA_KEY = "flux_fp4"


class LinearReport(BaseModel):
    """What quantization did to one Linear.

    Attributes:
        name: Full name, for example ``double_blocks.0.img_attn.qkv``.
        weight_sqnr_db: Of the weight against the source weight.
        output_sqnr_db: Of the Linear's output with quantized weight and input, over some of the
            calibration samples.
        input_amax: Largest input magnitude seen in calibration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    weight_sqnr_db: float
    output_sqnr_db: float
    input_amax: float


class BlockReport(BaseModel):
    """SQNR of what one block adds to its input, all its quantization taken together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    update_sqnr_db: float


class QuantizedMetadata(BaseModel):
    """What the header says about the file.

    Attributes:
        format_version: Of this layout.
        variant: FLUX model, for example ``flux1-dev``.
        config: The transformer's sizes.
        recipe: How it was quantized.
        fp8_attention: Whether q, k and v scales are present.
        high_precision: Type of everything that is not quantized inside a plan.
        calibration_digest: Of the calibration samples.
        calibration_samples: How many there were.
        source_name: File name of the source checkpoint.
        source_bytes: Its size.
        source_digest: blake3 of the whole source file.
        content_digest: blake3 over names and bytes of every tensor here.
        linears: Report by Linear.
        blocks: Report by block.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    variant: str
    config: FluxConfig
    recipe: str
    fp8_attention: bool
    high_precision: Literal["bf16", "fp16", "fp32"]
    calibration_digest: str
    calibration_samples: int
    source_name: str
    source_bytes: int
    source_digest: str
    content_digest: str
    linears: tuple[LinearReport, ...]
    blocks: tuple[BlockReport, ...]


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
        checkpoint._check_complete()
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

    def high_precision_state_dict(self) -> dict[str, Tensor]:
        """Load what stays outside of plans: embedders, modulation and final layer."""
        with safe_open(self.path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in self.tensors if not is_in_plan(name)}

    def was_made_from(
        self, source_name: str, source_bytes: int, options: QuantizeOptions, calibration: str
    ) -> bool:
        """Tell whether quantizing again with these inputs would write the same file.

        The source is compared by name and size; ``source_digest`` names it exactly.
        """
        metadata = self.metadata
        return (
            metadata.source_name == source_name
            and metadata.source_bytes == source_bytes
            and metadata.recipe == options.recipe
            and metadata.fp8_attention == options.fp8_attention
            and metadata.calibration_digest == calibration
        )

    def _check_complete(self) -> None:
        needed = quantized_tensor_names(self.metadata.config, self.metadata.fp8_attention)
        missing = sorted(needed - set(self.tensors))
        if self.metadata.recipe != UNQUANTIZED and missing:
            reason = f"it lacks {len(missing)} quantized tensors (first: '{missing[0]}')"
            raise QuantizedCheckpointError(self.path.name, reason)


UNQUANTIZED = "unquantized"
"""Recipe of a file whose Linears are all high precision: the reference for exported graphs."""


def is_in_plan(tensor: str) -> bool:
    """Tell whether a tensor belongs to a block plan: any block tensor but modulation."""
    in_block = tensor.startswith(("double_blocks.", "single_blocks."))
    modulation = (".img_mod.", ".txt_mod.", ".modulation.")
    return in_block and not any(part in tensor for part in modulation)


def quantized_tensor_names(config: FluxConfig, fp8_attention: bool) -> set[str]:
    """Return the names of every tensor that quantization adds or replaces."""
    parts = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    names = set()
    for block in config.block_names:
        names |= {f"{block}.{linear}.{part}" for linear in block_linears(block) for part in parts}
        if fp8_attention:
            names |= {f"{block}.attention.{part}" for part in ("q_scale", "k_scale", "v_scale")}
    return names


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
