"""Build one double and one single block of FLUX.1-dev's size from random data; print the counts.

usage: full_size_blocks.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from pack_import import register_pack

register_pack()

from flux_fp4.quant.checkpoint_writer import CheckpointWriter  # noqa: E402  # after register_pack
from flux_fp4.quant.flux.config import block_linears  # noqa: E402
from flux_fp4.quant.flux.model import Flux  # noqa: E402
from flux_fp4.quant.onnx_export import export_blocks  # noqa: E402
from flux_fp4.quant.quantized_checkpoint import QuantizedMetadata, is_in_plan  # noqa: E402
from flux_fp4.trt_runtime.builder import build_engine  # noqa: E402
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile  # noqa: E402
from tiny_flux import TINY, ignore_progress  # noqa: E402

CONFIG = TINY.model_copy(
    update={"hidden_size": 3072, "num_heads": 24, "depth": 1, "depth_single_blocks": 1}
)
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def main() -> None:
    path = Path(sys.argv[1]) / "full" / "full.safetensors"
    write_checkpoint(path)
    for onnx in export_blocks(path, ignore_progress):
        print(f"{onnx.name}: {onnx.stat().st_size:,} bytes")
    for max_batch in (1, 2):
        spec = BuildSpec(profile=ShapeProfile(max_batch=max_batch))
        for plan in build_engine(path.parent, spec, ignore_progress).blocks:
            print(
                f"batch {max_batch}, {plan.block}: {plan.bytes / 1e6:.1f} MB, "
                f"{plan.fp4_gemms_found} of {plan.fp4_gemms_expected} FP4 GEMMs, "
                f"{plan.fp8_mha_found} of {plan.fp8_mha_expected} FP8 attention"
            )


def layout() -> Layout:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Flux(CONFIG).state_dict().items()}
    result: Layout = {n: (torch.bfloat16, s) for n, s in shapes.items() if is_in_plan(n)}
    for block in CONFIG.block_names:
        for linear in (f"{block}.{linear}" for linear in block_linears(block)):
            rows, columns = shapes[f"{linear}.weight"]
            result[f"{linear}.weight"] = (torch.uint8, (rows, columns // 2))
            result[f"{linear}.weight_scale"] = (torch.float8_e4m3fn, (rows, columns // 16))
            result[f"{linear}.weight_scale_2"] = (torch.float32, ())
            result[f"{linear}.input_scale"] = (torch.float32, ())
        for part in "qkv":
            result[f"{block}.attention.{part}_scale"] = (torch.bfloat16, ())
    return result


def write_checkpoint(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(path, layout()) as writer:
        for name, (dtype, shape) in layout().items():
            if dtype == torch.uint8:
                value = torch.randint(0, 256, shape, dtype=dtype, generator=generator)
            elif shape:
                value = 1 + torch.rand(shape, generator=generator).to(torch.float32)
            else:
                value = torch.tensor(1e-3)
            writer.add(name, value.to(dtype))
        writer.finish(
            QuantizedMetadata(
                variant=CONFIG.variant,
                config=CONFIG,
                recipe="nvfp4-max",
                fp8_attention=True,
                high_precision="bf16",
                calibration_digest="",
                calibration_samples=0,
                source_name="random",
                source_bytes=0,
                source_digest="",
                content_digest=writer.content_digest(),
                linears=(),
                blocks=(),
            )
        )


if __name__ == "__main__":
    main()
