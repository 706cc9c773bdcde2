"""What an exported block says of itself in ``metadata_props``, and how it names inputs.

The runtime reads this contract from the file alone; the two packages share no code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..flux.config import block_linears
from ..quantized_checkpoint import QuantizedCheckpoint

CONTRACT_VERSION = 3

RANK_TILE = 16
"""Directions in a tile of low-rank factors: bf16 tensor cores multiply 16 at a time. Where the
builder cannot see in a shape that the rank is a multiple, two more kernels per Linear copy the
factors to pad them."""

DOUBLE_MODULATION = tuple(
    f"{stream}_mod{index}_{vector}"
    for stream in ("img", "txt")
    for index in (1, 2)
    for vector in ("shift", "scale", "gate")
)
"""Modulation inputs of a double block, in the order of ``modulation_vectors``."""

SINGLE_MODULATION = ("mod_shift", "mod_scale", "mod_gate")


MASK = "mask"
"""Input ``[B, 1, S, S]`` of masked variants: what is added to the attention scores."""


@dataclass(frozen=True)
class Variant:
    """What a block's graph takes besides the inputs that every block has.

    Attributes:
        lora: Low-rank factors of every Linear.
        mask: An attention mask.
    """

    lora: bool = False
    mask: bool = False

    def name_of(self, block: str) -> str:
        """Return the name of a block's variant."""
        return block + ".lora" * self.lora + ".mask" * self.mask


PLAIN = Variant()


def lora_down(linear: str) -> str:
    """Return the name of the factor ``[K, R, RANK_TILE]`` that is applied first."""
    return f"{linear}.lora_down"


def lora_up(linear: str) -> str:
    """Return the name of the factor ``[R, RANK_TILE, N]`` that is applied second."""
    return f"{linear}.lora_up"


def lora_rank_axis(linear: str) -> str:
    """Return the name of the dynamic axis R, in tiles: every Linear may have another rank."""
    return f"R_{linear}"


def block_kind(block: str) -> str:
    """Return ``double`` or ``single``."""
    return "double" if block.startswith("double_blocks.") else "single"


def contract_metadata(
    checkpoint: QuantizedCheckpoint, block: str, variant: Variant = PLAIN
) -> dict[str, str]:
    """Return the ``metadata_props`` of the ONNX file of a block or of one of its variants."""
    metadata = checkpoint.metadata
    config = metadata.config
    formats = {
        linear: checkpoint.linear_format(f"{block}.{linear}") for linear in block_linears(block)
    }
    fp4_linears, fp8_linears = (
        [linear for linear, stored in formats.items() if stored == wanted]
        for wanted in ("nvfp4", "fp8")
    )
    base = metadata.base_digest
    # a changed block belongs to the engine of its base; its own digest tells changes apart
    changed = {} if base is None else {"flux_fp4.changed_digest": metadata.content_digest}
    return {
        **changed,
        "flux_fp4.contract": str(CONTRACT_VERSION),
        "flux_fp4.block": variant.name_of(block),
        "flux_fp4.kind": block_kind(block),
        "flux_fp4.hidden_size": str(config.hidden_size),
        "flux_fp4.num_heads": str(config.num_heads),
        "flux_fp4.high_precision": metadata.high_precision,
        "flux_fp4.fp4_linears": json.dumps(fp4_linears),
        "flux_fp4.fp8_linears": json.dumps(fp8_linears),
        "flux_fp4.fp8_attention": str(int(metadata.fp8_attention)),
        "flux_fp4.depth": str(config.depth),
        "flux_fp4.depth_single_blocks": str(config.depth_single_blocks),
        "flux_fp4.checkpoint_digest": base or metadata.content_digest,
        "flux_fp4.recipe": metadata.recipe,
    }
