"""Kernels of a double and a single block by kind, from the log of a real build; no GPU is needed.

    python benchmarks/kernels.py FOLDER                  FLUX.1-dev's width, random weights
    python benchmarks/kernels.py FOLDER --width 256      the same counts, in seconds
    python benchmarks/kernels.py FOLDER --without-tiles  tokens not padded to whole tiles

Writes the weights into FOLDER first, once: 1.4 GB at full width. Prints a Markdown table: kernels
in all and by kind (``trt_runtime/kernel_counts.py`` says what counts), activation memory at the
profile's largest shape, size of the plan, seconds of one build. The plan of every row is linted.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from pack_import import register_pack  # noqa: E402

register_pack()

from flux_fp4.quant.onnx_export import export_blocks  # noqa: E402
from flux_fp4.trt_runtime.build_log import layers_from_log  # noqa: E402
from flux_fp4.trt_runtime.contract import variant_name  # noqa: E402
from flux_fp4.trt_runtime.errors.build import EngineLintError  # noqa: E402
from flux_fp4.trt_runtime.kernel_counts import KERNEL_KINDS, kernel_counts  # noqa: E402
from flux_fp4.trt_runtime.plan import PlanFactory  # noqa: E402
from flux_fp4.trt_runtime.plan_build import block_job  # noqa: E402
from flux_fp4.trt_runtime.signature import read_signature  # noqa: E402
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile  # noqa: E402
from full_size_blocks import CONFIG, write_checkpoint  # noqa: E402
from tiny_flux import ignore_progress  # noqa: E402

HEAD_DIM = 128
"""Of every FLUX."""


def of_one_size(img_tokens: int, txt_tokens: int) -> ShapeProfile:
    """Return a profile that allows one shape, which makes all token counts constants."""
    img, txt = (img_tokens,) * 3, (txt_tokens,) * 3
    return ShapeProfile(1, *img, *txt)


@dataclass(frozen=True)
class Variant:
    """One row per block."""

    label: str
    linears: str = "nvfp4"
    """A format of ``full_size_blocks.py``."""
    fp8_attention: bool = True
    lora: bool = False
    mask: bool = False
    profile: ShapeProfile = field(default_factory=ShapeProfile)


VARIANTS = (
    Variant("NVFP4, FP8 attention"),
    Variant("bf16 attention", fp8_attention=False),
    Variant("AWQ smoothing", "nvfp4-awq"),
    Variant("SVDQuant, rank 32", "nvfp4-svdquant"),
    Variant("fp8", "fp8"),
    Variant("bf16", "bf16", fp8_attention=False),
    Variant("LoRA as inputs", lora=True),
    Variant("mask", mask=True),
    Variant("LoRA and mask", lora=True, mask=True),
    Variant("batch of 1 to 4", profile=ShapeProfile(max_batch=4)),
    Variant("only 4096 + 512 tokens", profile=of_one_size(4096, 512)),
    Variant("only 4000 + 500 tokens", profile=of_one_size(4000, 500)),
)


def export_without_tiles() -> None:
    """Let blocks take tokens as they come."""
    from flux_fp4.quant.onnx_export import blocks
    from flux_fp4.quant.onnx_export.token_tiles import TokenTiles

    blocks.TokenTiles = lambda graph, x, tiled: TokenTiles(graph, x, tiled=False)  # type: ignore


def exported(folder: Path, variant: Variant, width: int) -> Path:
    """Return the folder with a variant's blocks as ONNX files; weights are written once."""
    attention = "fp8" if variant.fp8_attention else "bf16"
    path = folder / str(width) / f"{variant.linears}-{attention}" / "blocks.safetensors"
    config = CONFIG.model_copy(update={"hidden_size": width, "num_heads": width // HEAD_DIM})
    if not path.is_file():
        write_checkpoint(path, variant.linears, config, variant.fp8_attention)
    export_blocks(path, ignore_progress)
    return path.parent


def row(path: Path, variant: Variant, factory: PlanFactory) -> str:
    """Build one ONNX file and return its row."""
    signature = read_signature(path)
    spec = BuildSpec(profile=variant.profile)
    job = block_job(signature, path.with_suffix(".plan"), factory.backend, spec)
    try:
        plan = factory.build(job)
    except EngineLintError:
        return f"| {signature.kind} | {variant.label} | refused by the lint |"
    counts = kernel_counts(layers_from_log(factory.messages))
    cells = (
        signature.kind,
        variant.label,
        sum(counts.values()),
        *(count or "" for count in counts.values()),
        f"{plan.activation_bytes / 1e6:.0f}",
        f"{plan.bytes / 1e6:.1f}",
        f"{plan.build_seconds:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=CONFIG.hidden_size)
    parser.add_argument("--without-tiles", action="store_true")
    options = parser.parse_args()
    if options.without_tiles:
        export_without_tiles()
    factory = PlanFactory("tensorrt_rtx", lambda message: None)
    names = ("block", "variant", "kernels", *KERNEL_KINDS, "activations, MB", "MB", "build, s")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for variant in VARIANTS:
        folder = exported(options.folder, variant, options.width)
        for block in CONFIG.block_names:
            path = folder / f"{variant_name(block, variant.lora, variant.mask)}.onnx"
            print(row(path, variant, factory), flush=True)


if __name__ == "__main__":
    main()
