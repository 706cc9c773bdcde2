"""What quantizing and building a checkpoint will take, from its header alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .checkpoint_layout import Layout, checkpoint_layout, recipe_formats
from .quantized_checkpoint import is_in_plan
from .recipe import QuantizeOptions
from .sources.source import FluxSource
from .statistics import ROWS

BASE_MEMORY_BYTES = 350_000_000
"""Of Python, torch and this package, before a block is loaded."""

COPIES = {"max": 1, "four-over-six": 2, "mse": 2}
"""fp32 copies of the largest Linear by scale search. With `BASE_MEMORY_BYTES` and a block in bf16
this gives 1.3 GB for FLUX.1-dev with `nvfp4-max` and 1.7 GB with `nvfp4-svdquant-r32`; measured:
1.2 and 1.6 GB (`docs/benchmarks.md`)."""

PLAN_OVERHEAD = 1.03
"""A plan in parts of its packed weights: 2.5 % above in `docs/memory.md`."""


@dataclass(frozen=True)
class Needs:
    """Bytes that the stages need.

    Attributes:
        checkpoint: Of the tensors of the quantized checkpoint, exactly; its header takes a few MB.
            Recipe `auto` decides between formats later and may need more.
        statistics: Of the calibration statistics, about.
        plans: Of all plans for one target, about.
        block_plans: Of the weights in the plan of each block.
        memory: Main memory while a block is quantized, about.
    """

    checkpoint: int
    statistics: int
    plans: int
    block_plans: Mapping[str, int]
    memory: int

    @property
    def largest_plan(self) -> int:
        """Of the weights in the largest plan."""
        return max(self.block_plans.values())

    @property
    def disk(self) -> int:
        """Everything that is written."""
        return self.checkpoint + self.statistics + self.plans


def needs_of(source: FluxSource, options: QuantizeOptions) -> Needs:
    """Compute the needs of all stages.

    Args:
        source: What would be quantized.
        options: How.
    """
    formats = recipe_formats(source.config, options)
    linears = list(formats)
    layout = checkpoint_layout(source, formats, options)
    in_plans = {name: entry for name, entry in layout.items() if is_in_plan(name)}
    by_block: dict[str, Layout] = defaultdict(dict)
    for name, entry in in_plans.items():
        by_block[_block_of(name)][name] = entry
    return Needs(
        checkpoint=_bytes(layout),
        statistics=sum(_statistics_bytes(source, linear) for linear in linears),
        plans=round(PLAN_OVERHEAD * _bytes(in_plans)),
        block_plans={name: _bytes(block) for name, block in by_block.items()},
        memory=_memory_bytes(source, linears, options),
    )


def _block_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _bytes(layout: Layout) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in layout.values())


def _statistics_bytes(source: FluxSource, linear: str) -> int:
    _, width = source.shapes[f"{linear}.weight"]
    # rows in bf16, and two numbers per channel in fp32; the block's probes are small beside them
    return width * (2 * ROWS + 2 * 4)


def _memory_bytes(source: FluxSource, linears: list[str], options: QuantizeOptions) -> int:
    sizes = {name: torch.Size(shape).numel() for name, shape in source.shapes.items()}
    by_block: dict[str, int] = defaultdict(int)
    for name, size in sizes.items():
        # modulation is loaded with its block
        by_block[_block_of(name)] += size
    block = max(by_block[name] for name in source.config.block_names)
    largest = max(sizes[f"{linear}.weight"] for linear in linears)
    copies = COPIES[options.recipe.scale_search] + (options.recipe.low_rank is not None)
    return BASE_MEMORY_BYTES + 2 * block + 4 * copies * largest
