"""Build blocks of FLUX.1-dev's size from random data in each format; print what the lint counts.

usage: full_size_blocks.py FOLDER [FORMAT ...]

FORMAT: nvfp4, nvfp4-awq, nvfp4-svdquant, fp8, bf16 or mixed; all of them without one.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from pack_import import register_pack

register_pack()

from flux_fp4.quant.flux.config import FluxConfig, block_linears  # noqa: E402  # after register_pack
from flux_fp4.quant.flux.model import Flux  # noqa: E402
from flux_fp4.quant.onnx_export import export_blocks  # noqa: E402
from flux_fp4.quant.quantized_checkpoint import is_in_plan  # noqa: E402
from flux_fp4.trt_runtime.builder import build_engine  # noqa: E402
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile  # noqa: E402
from stored_checkpoint import save_stored  # noqa: E402
from tiny_flux import TINY, ignore_progress  # noqa: E402

CONFIG = TINY.model_copy(
    update={"hidden_size": 3072, "num_heads": 24, "depth": 1, "depth_single_blocks": 1}
)
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
RANK = 32
TARGETS = {"fp8": ("sm89", "sm120"), "bf16": ("sm86", "sm89", "sm120")}
"""Oldest GPU generation of a format and newer ones; NVFP4 runs on the newest alone."""
MIXED = {"img_attn.qkv": "fp8", "txt_mlp.2": "bf16", "txt_attn.qkv": "bf16", "linear2": "fp8"}
FORMATS = ("nvfp4", "nvfp4-awq", "nvfp4-svdquant", "fp8", "bf16", "mixed")


def main() -> None:
    for kind in sys.argv[2:] or FORMATS:
        path = Path(sys.argv[1]) / kind / f"{kind}.safetensors"
        write_checkpoint(path, kind)
        for onnx in export_blocks(path, ignore_progress):
            print(f"{kind}: {onnx.name}: {onnx.stat().st_size:,} bytes")
        for target in TARGETS.get(kind, ("sm120",)):
            for max_batch in (1, 2):
                report(path, kind, BuildSpec("tensorrt_rtx", (target,), ShapeProfile(max_batch)))


def exported_folder(root: Path) -> Path:
    """Return a folder with the blocks in NVFP4 and their ONNX files; 1.5 GB are written once."""
    path = root / "nvfp4" / "nvfp4.safetensors"
    if not path.is_file():
        write_checkpoint(path, "nvfp4")
    export_blocks(path, ignore_progress)
    return path.parent


def report(path: Path, kind: str, spec: BuildSpec) -> None:
    started = time.monotonic()
    manifest = build_engine(path.parent, spec, ignore_progress)
    for plan in manifest.blocks:
        found = ", ".join(
            f"{value} {name.removesuffix('_found')}"
            for name, value in plan.model_dump().items()
            if name.endswith("_found")
        )
        print(
            f"{kind}, {spec.targets[0]}, batch {spec.profile.max_batch}, {plan.block}: "
            f"{plan.bytes / 1e6:.1f} MB, {plan.build_seconds:.1f} s, {found}"
        )
    print(f"{time.monotonic() - started:.1f} s")


def linear_layout(kind: str, rows: int, columns: int) -> Layout:
    """dtype and shape of what one Linear stores."""
    if kind == "bf16":
        return {"weight": (torch.bfloat16, (rows, columns))}
    if kind == "fp8":
        return {
            "weight": (torch.float8_e4m3fn, (rows, columns)),
            "weight_scale": (torch.float32, (rows,)),
            "input_scale": (torch.float32, ()),
        }
    layout: Layout = {
        "weight": (torch.uint8, (rows, columns // 2)),
        "weight_scale": (torch.float8_e4m3fn, (rows, columns // 16)),
        "weight_scale_2": (torch.float32, ()),
        "input_scale": (torch.float32, ()),
    }
    if kind != "nvfp4":
        layout["pre_quant_scale"] = (torch.bfloat16, (columns,))
    if kind == "nvfp4-svdquant":
        layout["svd_down"] = (torch.bfloat16, (RANK, columns))
        layout["svd_up"] = (torch.bfloat16, (rows, RANK))
    return layout


def checkpoint_layout(kind: str, config: FluxConfig, fp8_attention: bool) -> Layout:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Flux(config).state_dict().items()}
    result: Layout = {n: (torch.bfloat16, s) for n, s in shapes.items() if is_in_plan(n)}
    for block in config.block_names:
        for linear in block_linears(block):
            name = f"{block}.{linear}"
            own = MIXED.get(linear, "nvfp4") if kind == "mixed" else kind
            parts = linear_layout(own, *shapes[f"{name}.weight"])
            result |= {f"{name}.{part}": entry for part, entry in parts.items()}
        for part in "qkv" if fp8_attention else "":
            result[f"{block}.attention.{part}_scale"] = (torch.bfloat16, ())
    return result


def write_checkpoint(
    path: Path, kind: str, config: FluxConfig = CONFIG, fp8_attention: bool | None = None
) -> None:
    """Write random weights; attention is in FP8 unless the Linears are in bf16 or it is said."""
    if fp8_attention is None:
        fp8_attention = kind != "bf16"
    generator = torch.Generator().manual_seed(0)
    layout = checkpoint_layout(kind, config, fp8_attention)
    state = {}
    for name, (dtype, shape) in layout.items():
        if dtype == torch.uint8:
            value = torch.randint(0, 256, shape, dtype=dtype, generator=generator)
        elif shape:
            value = 1 + torch.rand(shape, generator=generator)
        else:
            value = torch.tensor(1e-3)
        state[name] = value.to(dtype)
    save_stored(state, path, config, fp8_attention)


if __name__ == "__main__":
    main()
