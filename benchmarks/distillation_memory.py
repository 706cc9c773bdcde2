"""Memory of distilling FLUX.1-dev as a whole, by number of GPUs, from the shapes of its tensors.

    python benchmarks/distillation_memory.py

Nothing is measured: these are the parameters and what torch keeps for each of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from full_size import FLUX1_DEV  # noqa: E402
from pack_import import register_pack  # noqa: E402

register_pack()

from flux_fp4.quant.flux.model import tensor_shapes  # noqa: E402
from flux_fp4.quant.nvfp4 import NVFP4_BLOCK  # noqa: E402
from flux_fp4.quant.quantized_checkpoint import is_in_plan  # noqa: E402

TOKENS = 4096 + 512
"""Of a picture of 1024 x 1024 pixels and its text."""

FP32, BF16 = 4, 2
COPIES = ("value", "gradient", "Adam's mean", "Adam's mean square", "moving average")


def main() -> None:
    shapes = tensor_shapes(FLUX1_DEV)
    sizes = {name: _count(shape) for name, shape in shapes.items()}
    linears = {n: s for n, s in sizes.items() if is_in_plan(n) and len(shapes[n]) == 2}
    biases = sum(sizes[n.removesuffix("weight") + "bias"] for n in linears)
    weights = sum(linears.values())
    scales = weights // NVFP4_BLOCK
    trained = weights + scales + biases
    frozen = sum(sizes.values()) - weights - biases
    sharded = trained * FP32 * len(COPIES) + frozen * BF16
    largest = max(_block(linears, f"double_blocks.{i}.") for i in range(FLUX1_DEV.depth))
    inputs = len(FLUX1_DEV.block_names) * TOKENS * FLUX1_DEV.hidden_size * BF16
    softmax = FLUX1_DEV.num_heads * TOKENS**2
    print(f"trained: {weights / 1e9:.2f} G weights, {scales / 1e9:.2f} G block scales, "
          f"{biases / 1e9:.3f} G biases; frozen: {frozen / 1e9:.2f} G")  # fmt: skip
    print(f"sharded: {len(COPIES)} fp32 copies ({', '.join(COPIES)}) and frozen in bf16: "
          f"{sharded / 1e9:.0f} GB")  # fmt: skip
    # gathered values of this block and the next one, and gradients of one
    whole = scales * FP32 + 3 * largest * FP32
    print(f"on every GPU: calibrated scales and gathered blocks: {whole / 1e9:.1f} GB")
    print(f"a sample of {TOKENS} tokens: inputs of blocks {inputs / 1e9:.1f} GB, one softmax in "
          f"fp32 {softmax * FP32 / 1e9:.1f} GB")  # fmt: skip
    for gpus in (1, 2, 4, 8, 16):
        print(f"{gpus:>3} GPUs: {(sharded / gpus + whole) / 1e9:6.1f} GB each, without samples")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _block(linears: dict[str, int], start: str) -> int:
    return sum(size for name, size in linears.items() if name.startswith(start))


if __name__ == "__main__":
    main()
