"""What an engine runs: its own blocks, unless something else was chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .adapters import Adapters
from .contract import variant_name


@dataclass(frozen=True)
class BakedBlocks:
    """Changed blocks on disk, laid out as a checkpoint's.

        <folder>/double_blocks.0.onnx    a changed block, and its weights beside it
        <folder>/<target>/baked.json     describes its plan for an engine's target

    Attributes:
        folder: Holds the ONNX file of each.
        blocks: Their names; every one of them runs in the place of the engine's own.
    """

    folder: Path
    blocks: tuple[str, ...]

    def plan_dir(self, engine_dir: Path) -> Path:
        """Return the folder of the plans for an engine."""
        return self.folder / engine_dir.name


@dataclass(frozen=True)
class Selection:
    """Which form of each block runs.

    Attributes:
        adapters: By block, then by Linear. Those blocks run the variant that takes factors, all
            others run without.
        baked: Changed blocks, which take no adapters; None: there are none.
        masked: Whether all blocks take an attention mask. The kernels of both forms are fused
            alike, and two sets of plans would take twice the memory, so it is all or none.
    """

    adapters: Adapters = field(default_factory=dict)
    baked: BakedBlocks | None = None
    masked: bool = False

    def __post_init__(self) -> None:
        """Adapters and baked blocks are two ways of one thing."""
        assert not (self.adapters and self.baked), "adapters run beside an engine's own blocks"

    def name_of(self, block: str) -> str:
        """Return the name of the form in which a block runs."""
        return variant_name(block, block in self.adapters, self.masked)

    def is_baked(self, block: str) -> bool:
        """Tell whether a changed block runs in its place."""
        return self.baked is not None and block in self.baked.blocks
