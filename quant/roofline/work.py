"""What one sampling step has to compute and move, kernel by kernel.

The kernels are those that no builder can do without, as far as plans of one block each and GEMMs of
FP4 allow: one GEMM per Linear, one attention, and between two of them one pass that reads what
the one wrote and writes what the other reads. Real plans have more (docs/performance.md).
Letters as in ``flux/layers.py``: ``N`` image tokens, ``T`` text tokens, ``S`` both, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from ..flux.config import FluxConfig, block_linears, plan_shapes
from ..flux.model import tensor_shapes
from ..modulation import is_modulation_weight
from ..nvfp4 import NVFP4_BLOCK
from ..quantized_checkpoint import is_in_plan
from ..recipe import Format

BYTES: Mapping[Format, float] = {"nvfp4": 0.5 + 1 / NVFP4_BLOCK, "fp8": 1.0, "bf16": 2.0}
"""Per value, with NVFP4's block scales."""

LINEARS = "Linears"
ATTENTION = "attention"
BETWEEN = "norms, activations, rounding"
BRANCHES = "low-rank branches"
LORA = "LoRA"
MODULATION = "modulation"
ENDS = "embedders and final layer"

_STREAM_COPIES = 6
"""As ``nodes/engine_model.py`` counts them."""

_OF_IMAGE, _OF_TEXT = ("img_in", "final_layer.linear"), ("txt_in",)
"""Linears around the blocks that see every token; the others see one vector per picture."""


@dataclass(frozen=True)
class StepSizes:
    """What a step works on.

    Attributes:
        batch: Pictures.
        img_tokens: Of each picture, those of reference pictures included.
        txt_tokens: Of each prompt.
    """

    batch: int
    img_tokens: int
    txt_tokens: int


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed.

    Attributes:
        formats: By full name of each Linear in blocks.
        fp8_attention: Whether attention multiplies FP8, else bf16.
        modulation: Storage of the modulation Linears.
        modulation_per_step: Whether they are read in every step; else once per prompt.
        branch_rank: Of SVDQuant's branches on NVFP4 Linears; 0 is none.
        lora_rank: Of all LoRAs together, on every Linear of blocks; 0 is none or a baked one.
    """

    formats: Mapping[str, Format]
    fp8_attention: bool = True
    modulation: Format = "bf16"
    modulation_per_step: bool = False
    branch_rank: int = 0
    lora_rank: int = 0

    @property
    def attention_unit(self) -> Format:
        """Format in which attention multiplies."""
        return "fp8" if self.fp8_attention else "bf16"


@dataclass(frozen=True)
class Kernel:
    """A kernel, or equal ones.

    Attributes:
        part: What it belongs to, such as ``LINEARS``.
        name: Of the Linear or step.
        unit: Format in which it multiplies.
        flops: Multiplications and additions, counted as two, of all tokens.
        bytes: Read and written, weights included.
        block: Of which it is a part; empty outside of blocks.
    """

    part: str
    name: str
    unit: Format
    flops: float
    bytes: float
    block: str = ""


def step_kernels(config: FluxConfig, sizes: StepSizes, options: StepOptions) -> list[Kernel]:
    """Return the kernels of one step, block after block."""
    kernels = list(_end_kernels(config, sizes))
    for block in config.block_names:
        streams = _streams(block, sizes)
        kernels += _linear_kernels(config, block, streams, options)
        kernels.append(_attention_kernel(config, block, sizes, options))
        kernels += _between_kernels(config, block, streams, options)
    if options.modulation_per_step:
        kernels += _modulation_kernels(config, sizes, options.modulation)
    return kernels


def weight_bytes(config: FluxConfig, options: StepOptions) -> float:
    """Return the bytes of all weights in plans."""
    return sum(
        rows * columns * BYTES[options.formats[f"{block}.{linear}"]]
        + 2 * _branch_rank(f"{block}.{linear}", options) * (rows + columns)
        for block in config.block_names
        for linear, (rows, columns) in _shapes(config, block).items()
    )


def modulation_bytes(config: FluxConfig, storage: Format) -> float:
    """Return the bytes of all modulation weights."""
    return (
        sum(rows * columns for rows, columns in _modulation_linears(config).values())
        * BYTES[storage]
    )


def passing_bytes(config: FluxConfig) -> float:
    """Return the room for a modulation Linear on its way, as ``nodes/modulation_table.py`` does."""
    return 4.0 * max(rows * columns for rows, columns in _modulation_linears(config).values())


def lora_bytes(config: FluxConfig, rank: int) -> float:
    """Return the bytes of factors in bf16 on every Linear of blocks."""
    shapes = (_shapes(config, block).values() for block in config.block_names)
    return sum(2 * rank * (rows + columns) for block in shapes for rows, columns in block)


def end_bytes(config: FluxConfig) -> float:
    """Return the bytes of the weights around the blocks, in bf16."""
    return sum(2.0 * rows * columns for rows, columns in _end_linears(config).values())


def activation_bytes(config: FluxConfig, sizes: StepSizes, options: StepOptions) -> float:
    """Return about how much memory the intermediate results of the larger kind of block take.

    In a single block, the stream, what ``linear1`` gives, what attention and ``linear2`` read: for
    FLUX.1 with FP8 attention 89,088 bytes per token, 3 % more than the builder of TensorRT-RTX
    1.7.1 reports (397,246,464 bytes for 4,608 tokens, docs/memory.md).
    """
    tokens = sizes.batch * (sizes.img_tokens + sizes.txt_tokens)
    width = config.hidden_size
    first, second = 3 * width + config.mlp_in_size, width + config.mlp_size
    attention = 3 * width * BYTES[options.attention_unit]
    return tokens * (2 * (width + first + second) + attention)


def stream_bytes(config: FluxConfig, sizes: StepSizes) -> float:
    """Return what the tokens take between blocks, in bf16, with the copies of ComfyUI's loop."""
    tokens = sizes.batch * (sizes.img_tokens + sizes.txt_tokens)
    return _STREAM_COPIES * 2 * tokens * config.hidden_size


def _streams(block: str, sizes: StepSizes) -> dict[str, int]:
    """Return the tokens of each stream of a block by the prefix of its Linears."""
    if block.startswith("double_blocks."):
        return {"img_": sizes.batch * sizes.img_tokens, "txt_": sizes.batch * sizes.txt_tokens}
    return {"": sizes.batch * (sizes.img_tokens + sizes.txt_tokens)}


def _shapes(config: FluxConfig, block: str) -> dict[str, tuple[int, int]]:
    shapes = plan_shapes(config, block)
    found = {linear: shapes[f"{linear}.weight"] for linear in block_linears(block)}
    return {linear: (rows, columns) for linear, (rows, columns) in found.items()}


def _tokens_of(linear: str, streams: Mapping[str, int]) -> int:
    return next(tokens for prefix, tokens in streams.items() if linear.startswith(prefix))


def _branch_rank(linear: str, options: StepOptions) -> int:
    return options.branch_rank if options.formats[linear] == "nvfp4" else 0


def _linear_kernels(
    config: FluxConfig, block: str, streams: Mapping[str, int], options: StepOptions
) -> Iterator[Kernel]:
    for linear, (rows, columns) in _shapes(config, block).items():
        tokens, name = _tokens_of(linear, streams), f"{block}.{linear}"
        yield _gemm(LINEARS, linear, options.formats[name], tokens, rows, columns, block)
        if rank := _branch_rank(name, options):
            yield _low_rank(BRANCHES, linear, tokens, rows, columns, rank, block)
        if options.lora_rank:
            yield _low_rank(LORA, linear, tokens, rows, columns, options.lora_rank, block)


def _gemm(
    part: str, name: str, unit: Format, tokens: int, rows: int, columns: int, block: str = ""
) -> Kernel:
    """A Linear of ``[rows, columns]``: rounded inputs and weights in, bf16 out."""
    moved = BYTES[unit] * columns * (tokens + rows) + 2 * tokens * rows
    return Kernel(part, name, unit, 2.0 * tokens * rows * columns, moved, block)


def _low_rank(
    part: str, name: str, tokens: int, rows: int, columns: int, rank: int, block: str
) -> Kernel:
    """Two thin GEMMs in bf16, the second of which reads and writes the Linear's output."""
    flops = 2.0 * tokens * rank * (rows + columns)
    moved = 2 * (tokens * columns + rank * (rows + columns) + 2 * tokens * rank + 2 * tokens * rows)
    return Kernel(part, name, "bf16", flops, moved, block)


def _attention_kernel(
    config: FluxConfig, block: str, sizes: StepSizes, options: StepOptions
) -> Kernel:
    """Q k^T and its product with v: two GEMMs of ``S x S`` for each channel."""
    tokens, width = sizes.img_tokens + sizes.txt_tokens, config.hidden_size
    unit = options.attention_unit
    flops = 4.0 * sizes.batch * tokens**2 * width
    moved = sizes.batch * tokens * width * (3 * BYTES[unit] + 2)
    return Kernel(ATTENTION, ATTENTION, unit, flops, moved, block)


def _between_kernels(
    config: FluxConfig, block: str, streams: Mapping[str, int], options: StepOptions
) -> Iterator[Kernel]:
    """The passes between GEMMs; their few operations per value never count."""
    width, hidden, mlp_in = config.hidden_size, config.mlp_size, config.mlp_in_size
    rotated = 3 * width * BYTES[options.attention_unit]

    def rounded(linear: str, columns: int) -> float:
        return columns * BYTES[options.formats[f"{block}.{linear}"]]

    for prefix, tokens in streams.items():
        if prefix:
            into = {name: f"{prefix}{name}" for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")}
            per_token = {
                "modulate": 2 * width + rounded(into["attn.qkv"], width),
                "norm and rotate q, k": 6 * width + rotated,
                "round attention": 2 * width + rounded(into["attn.proj"], width),
                "gate, add, modulate": 6 * width + rounded(into["mlp.0"], width),
                "activation": 2 * mlp_in + rounded(into["mlp.2"], hidden),
                "gate, add": 6 * width,
            }
        else:
            per_token = {
                "modulate": 2 * width + rounded("linear1", width),
                "norm and rotate q, k": 6 * width + rotated,
                "activation": 2 * (mlp_in + width) + rounded("linear2", width + hidden),
                "gate, add": 6 * width,
            }
        for name, moved in per_token.items():
            yield Kernel(BETWEEN, f"{prefix}{name}", "bf16", 0.0, tokens * moved, block)


def _modulation_kernels(config: FluxConfig, sizes: StepSizes, storage: Format) -> Iterator[Kernel]:
    """One vector per picture through each Linear: weights are read, hardly anything computed."""
    for name, (rows, columns) in _modulation_linears(config).items():
        flops = 2.0 * sizes.batch * rows * columns
        yield Kernel(MODULATION, name, "bf16", flops, rows * columns * BYTES[storage])


def _end_kernels(config: FluxConfig, sizes: StepSizes) -> Iterator[Kernel]:
    counts = dict.fromkeys(_OF_IMAGE, sizes.img_tokens) | dict.fromkeys(_OF_TEXT, sizes.txt_tokens)
    for name, (rows, columns) in _end_linears(config).items():
        yield _gemm(ENDS, name, "bf16", sizes.batch * counts.get(name, 1), rows, columns)


@cache
def _linears_outside(config: FluxConfig) -> dict[str, tuple[int, int]]:
    """Return rows and columns of every Linear that is in no plan, by name."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2 and not is_in_plan(name)
    }


def _modulation_linears(config: FluxConfig) -> dict[str, tuple[int, int]]:
    found = _linears_outside(config).items()
    return {name: shape for name, shape in found if is_modulation_weight(f"{name}.weight")}


def _end_linears(config: FluxConfig) -> dict[str, tuple[int, int]]:
    found = _linears_outside(config).items()
    return {name: shape for name, shape in found if not is_modulation_weight(f"{name}.weight")}
