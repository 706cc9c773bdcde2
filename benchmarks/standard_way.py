"""The same FLUX.1 by the standard way and by this pack: seconds and memory of every stage.

    python benchmarks/standard_way.py FOLDER                     2+4 and 4+8 blocks
    python benchmarks/standard_way.py FOLDER --blocks 2 3 4      2+4, 3+6 and 4+8 blocks

The standard way is NVIDIA's for diffusion models, with the whole model in memory: ModelOpt's
``mtq.quantize``, ``torch.onnx.export``, ``NVFP4QuantExporter`` and one TensorRT-RTX build of the
whole graph. FLUX.1-dev does not fit that way into 24 GB, so models of its widths with random
weights and fewer blocks are measured, ``n`` double and ``2n`` single ones, and lines through them
extrapolated. (What this pack needs at full size is measured by ``full_size.py``.) Both ways
quantize the same Linears of the same file to NVFP4 with scales from maxima, calibrate with the same
samples, and build for the same target and shapes; attention is in bf16.

Without a GPU. Imports are not timed. The standard way's model is out of memory before its ONNX file
is converted, unlike in NVIDIA's example: that is in its favour. Its plan holds modulation,
embedders and last layer too, some 3.3 of 11.9 billion weights, which ours leaves in the checkpoint.

One line of JSON per stage goes to the terminal and to FOLDER/results.jsonl, what the libraries
print to FOLDER/log.txt; other files are deleted. ``held`` memory is anonymous memory, which the
system cannot take back; ``resident`` includes what is mapped from files. Both are of a stage's
process with its build processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import full_size  # first: it registers the package
import numpy as np
import onnx
import torch
from flux_fp4.quant.calibration import CalibrationSample
from flux_fp4.quant.flux import layers
from flux_fp4.quant.flux.blocks import block_modulation
from flux_fp4.quant.flux.config import FluxConfig, block_linears
from flux_fp4.quant.flux.model import Flux, image_ids, patchify, tensor_shapes, text_ids
from flux_fp4.quant.onnx_export import export_blocks
from flux_fp4.quant.quantize import quantize_checkpoint
from flux_fp4.quant.recipe import QuantizeOptions
from flux_fp4.quant.sources.source import open_source
from flux_fp4.quant.stack import collect_statistics, compute_dtype
from flux_fp4.quant.statistics_files import StatisticsFolder
from flux_fp4.trt_runtime.builder import build_engine
from flux_fp4.trt_runtime.plan import BuildJob, PlanFactory
from flux_fp4.trt_runtime.spec import BuildSpec, ShapeProfile
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

PROFILE = ShapeProfile(max_batch=1, max_img_tokens=4096, max_txt_tokens=512)
WORKERS = 2

AXES: dict[str, dict[int, str]] = {
    "img": {0: "B", 1: "N"},
    "txt": {0: "B", 1: "T"},
    "cos": {0: "B", 1: "S"},
    "sin": {0: "B", 1: "S"},
    "timesteps": {0: "B"},
    "y": {0: "B"},
    "guidance": {0: "B"},
}
"""Inputs of the exported model, as of our own whole transformer, with their dynamic axes."""

OPSET = 20
"""Of the examples in ModelOpt 0.47; ``NVFP4QuantExporter`` raises it to 23."""

HIGH_PRECISION = ("*_in.*", "*_mod.*", "*modulation*", "final_layer.*")
"""What this pack leaves in bf16 too."""


class ExportedFlux(Flux):
    """FLUX with the rotary embedding as an input: TensorRT-RTX has no fp64."""

    def forward(  # type: ignore[override]
        self,
        img: Tensor,
        txt: Tensor,
        cos: Tensor,
        sin: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor,
    ) -> Tensor:
        """Predict the velocity of latent patches."""
        img, txt, vec = self.embed(img, txt, timesteps, y, guidance)
        for block in self.double_blocks:
            img, txt = block(img, txt, cos, sin, block_modulation(block, vec, None))
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, cos, sin, block_modulation(block, vec, None))
        return self.final_layer(x[:, txt.shape[1] :], vec)


def model_inputs(sample: CalibrationSample, config: FluxConfig) -> tuple[Tensor, ...]:
    """Return a sample as ``ExportedFlux`` takes it."""
    condition = sample.conditioning
    img, txt = patchify(sample.latent), condition.context
    ids = torch.cat((text_ids(txt.shape[1], config), image_ids(*sample.latent.shape[-2:])), dim=1)
    rotary = layers.rope_cos_sin(ids, config.axes_dim, config.theta)
    numbers = (torch.tensor([sample.t]), condition.pooled, torch.tensor([condition.guidance]))
    high = torch.bfloat16
    return (img.to(high), txt.to(high), *rotary, *(number.to(high) for number in numbers))


def standard_torch(folder: Path, config: FluxConfig) -> None:
    """Quantize and export by ModelOpt in one process, as NVIDIA's example does."""
    mtq, configure = import_modelopt()
    make_exportable()
    inputs = [model_inputs(sample, config) for sample in full_size.samples().samples]
    with torch.inference_mode():
        with measured(folder, config, "standard", "quantize") as row:
            model = load_model(folder, config)

            def calibrate(model: nn.Module) -> None:
                started = time.monotonic()
                for sample in inputs:
                    model(*sample)
                row["of_which_calibration"] = round(time.monotonic() - started, 1)

            mtq.quantize(model, modelopt_config(), calibrate)
        raw = folder / "raw"
        raw.mkdir()
        with measured(folder, config, "standard", "export"), configure(model):
            torch.onnx.export(
                model,
                inputs[0],
                str(raw / "model.onnx"),
                input_names=list(AXES),
                output_names=["velocity"],
                dynamic_axes=AXES,
                opset_version=OPSET,
                do_constant_folding=True,
                dynamo=False,
            )


def import_modelopt():
    """Import what quantizes, with an operator for the NVFP4 that ModelOpt 0.47 has on GPUs only.

    Calibration of maxima executes no NVFP4, and for the exporter the operator has to be opaque.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.export_onnx import configure_linear_module_onnx_quantizers

    torch.library.define("standard_way::nvfp4", "(Tensor x) -> Tensor")
    torch.library.impl("standard_way::nvfp4", "cpu")(torch.clone)

    def quantize(inputs: Tensor, *_settings: object) -> Tensor:
        assert torch.onnx.is_in_onnx_export()
        return torch.ops.standard_way.nvfp4(inputs)

    tensor_quant.dynamic_block_quantize_op = quantize
    return mtq, configure_linear_module_onnx_quantizers


def make_exportable() -> None:
    """Restate norms for the exporter that ModelOpt needs, of torch 2.11 with ``dynamo=False``.

    It does not know RMSNorm, and wants to see that the normalized axis has a fixed length.
    """
    layer_norm = functional.layer_norm

    def static_layer_norm(x: Tensor, shape: Sequence[int], eps: float) -> Tensor:
        return layer_norm(x, [int(length) for length in shape], eps=eps)

    def rms_norm(x: Tensor, _shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
        values = x.float()
        normalized = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
        return normalized.to(x.dtype) * weight

    functional.layer_norm, functional.rms_norm = static_layer_norm, rms_norm


def modelopt_config() -> dict[str, object]:
    """Return ModelOpt 0.47's ``configs/ptq/presets/model/nvfp4`` for the Linears of blocks."""
    nvfp4 = {
        "num_bits": (2, 1),
        "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)},
        "trt_high_precision_dtype": "BFloat16",
    }
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": nvfp4},
        {"quantizer_name": "*input_quantizer", "cfg": nvfp4},
    ]
    rules += [{"quantizer_name": name, "enable": False} for name in HIGH_PRECISION]
    return {"quant_cfg": rules, "algorithm": "max"}


def load_model(folder: Path, config: FluxConfig) -> ExportedFlux:
    """Load the whole model into memory."""
    with torch.device("meta"):
        model = ExportedFlux(config)
    model.load_state_dict(load_file(folder / "source.safetensors"), assign=True)
    return model.eval().requires_grad_(False)


def standard_convert(folder: Path, config: FluxConfig) -> None:
    """Pack the weights of the exported graph."""
    from modelopt.onnx.export import NVFP4QuantExporter

    with measured(folder, config, "standard", "convert") as row:
        model = NVFP4QuantExporter.process_model(onnx.load(str(folder / "raw" / "model.onnx")))
        converted = folder / "converted"
        converted.mkdir()
        path = converted / "model.onnx"
        onnx.save(model, str(path), save_as_external_data=True, location="model.data")
        row["file_gb"] = gigabytes(converted)


def standard_build(folder: Path, config: FluxConfig) -> None:
    """Build one plan of the whole graph, checked as the plans of blocks are."""
    plan = folder / "model.plan"
    bounds = {
        name: tuple(zip(*(PROFILE.bounds(axis) for axis in axes.values()), strict=True))
        for name, axes in AXES.items()
    }
    shapes = {"img": (64,), "txt": (config.context_in_dim,), "y": (config.vec_in_dim,)}
    shapes |= dict.fromkeys(("cos", "sin"), (config.head_dim // 2,))
    path = folder / "converted" / "model.onnx"
    job = BuildJob(
        block="the model",
        backend="tensorrt_rtx",
        onnx=str(path),
        plan=str(plan),
        targets=BuildSpec().targets,
        profile={
            name: tuple((*bound, *shapes.get(name, ())) for bound in bounds[name]) for name in AXES
        },
        fp4_linears=quantized_linears(path, config),
        fp8_linears=(),
        fp8_attention=False,
    )
    with measured(folder, config, "standard", "build") as row:
        built = PlanFactory(job.backend, lambda message: None).build(job)
        row["file_gb"] = round(built.bytes / 1e9, 2)
        row["fp4_gemms"] = built.fp4_gemms_found


def quantized_linears(path: Path, config: FluxConfig) -> tuple[str, ...]:
    """Return how the exporter named the Linears of blocks: by the order of calls where it has to.

    ``double_blocks.0.img_attn.qkv`` is ``/double_blocks.0/qkv``, that of text ``qkv_1``.
    """
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    names = [node.name.removesuffix("/MatMul") for node in nodes if node.op_type == "MatMul"]
    linears = tuple(n for n in names if "_blocks." in n and "/attention" not in n)
    assert len(linears) == sum(len(block_linears(block)) for block in config.block_names)
    return linears


def our_checkpoint(folder: Path) -> Path:
    return folder / "ours" / "ours.safetensors"


def our_calibrate(folder: Path, config: FluxConfig) -> None:
    """Collect statistics."""
    with measured(folder, config, "ours", "calibrate"):
        source, calibration = open_source(folder / "source.safetensors"), full_size.samples()
        statistics = StatisticsFolder(folder / "statistics", source.digest(), calibration.digest())
        collect_statistics(
            source, calibration, statistics, full_size.show, "cpu", compute_dtype("cpu")
        )


def our_quantize(folder: Path, config: FluxConfig) -> None:
    """Quantize from statistics."""
    options = QuantizeOptions(fp8_attention=False)
    assert options.recipe.name == "nvfp4-max"
    with measured(folder, config, "ours", "quantize") as row:
        source, checkpoint = open_source(folder / "source.safetensors"), our_checkpoint(folder)
        quantize_checkpoint(
            source, checkpoint, full_size.samples(), options, folder / "statistics", full_size.show
        )
        row["file_gb"] = gigabytes(checkpoint.parent)


def our_export(folder: Path, config: FluxConfig) -> None:
    """Export the blocks."""
    with measured(folder, config, "ours", "export"):
        export_blocks(our_checkpoint(folder), full_size.show)


def our_build(folder: Path, config: FluxConfig) -> None:
    """Build the plans of the blocks."""
    with measured(folder, config, "ours", "build") as row:
        spec = BuildSpec(profile=PROFILE)
        manifest = build_engine(our_checkpoint(folder).parent, spec, full_size.show, WORKERS)
        row["file_gb"] = round(sum(plan.bytes for plan in manifest.blocks) / 1e9, 2)
        row["fp4_gemms"] = sum(plan.fp4_gemms_found for plan in manifest.blocks)


STAGES = {
    stage.__name__: stage
    for stage in (
        standard_torch,
        standard_convert,
        standard_build,
        our_calibrate,
        our_quantize,
        our_export,
        our_build,
    )
}
"""What runs in a process of its own, in this order."""


@contextmanager
def measured(folder: Path, config: FluxConfig, way: str, stage: str) -> Iterator[dict[str, Any]]:
    """Time what is done inside and write it as a line, with what is put into the row."""
    row: dict[str, Any] = {
        "way": way,
        "stage": stage,
        "blocks": f"{config.depth}+{config.depth_single_blocks}",
        "weights": weights(config),
        "load_before": round(os.getloadavg()[0], 1),
    }
    began = time.monotonic()
    yield row
    row["seconds"] = round(time.monotonic() - began, 1)
    row["window"] = began, time.monotonic()
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


class MemoryWatch:
    """Samples memory of another process and its children.

    ``full_size.MemoryMeter`` is a thread of the process that it watches, so it sleeps whenever C++
    holds the interpreter's lock, as ``torch.onnx.export`` does at its peak.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.samples: list[tuple[float, int, int]] = []
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while self.process.poll() is None:
            family = [f"{self.process.pid}", *_children(f"{self.process.pid}")]
            sizes = [full_size._memory(pid) for pid in family]
            held, resident = map(sum, zip(*sizes, strict=True))
            self.samples.append((time.monotonic(), held, resident))
            time.sleep(0.02)

    def peaks_gb(self, began: float, ended: float) -> dict[str, float]:
        """Return the peaks within a time."""
        self._thread.join()
        inside = [(0, 0), *(sizes for at, *sizes in self.samples if began <= at <= ended)]
        held, resident = (max(column) for column in zip(*inside, strict=True))
        return {
            "peak_held_gb": round(held / 1e9, 2),
            "peak_resident_gb": round(resident / 1e9, 2),
        }


def _children(process: str) -> list[str]:
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        return [pid for task in tasks for pid in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return []


MIN_BLOCKS = 2
"""With one double block the ONNX file stays below 2 GB, and torch 2.11 makes it whole in memory:
4.8 GB held for 1.4 GB of weights. Above, it writes tensor by tensor: 1.0 GB held for 2.6 GB. No
line goes through both."""


def truncated(blocks: int) -> FluxConfig:
    """Return FLUX.1-dev with fewer blocks."""
    return full_size.FLUX1_DEV.model_copy(
        update={"depth": blocks, "depth_single_blocks": 2 * blocks}
    )


COLUMNS = ("seconds", "of_which_calibration", "peak_held_gb", "peak_resident_gb")


def weights(config: FluxConfig) -> int:
    """Return the number of weights."""
    return sum(int(np.prod(shape)) for shape in tensor_shapes(config).values())


def gigabytes(folder: Path) -> float:
    """Return the size of a folder's files."""
    return round(sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / 1e9, 2)


def measure(folder: Path, blocks: int) -> list[dict[str, Any]]:
    """Measure every stage at one model size; a way ends at the stage that fails."""
    full_size.write_source(folder / "source.safetensors", truncated(blocks))
    rows, failed = [], set()
    for stage in STAGES:
        way = stage.partition("_")[0]
        if way in failed:
            continue
        command = [sys.executable, __file__, str(folder), "--blocks", f"{blocks}", "--stage", stage]
        with (folder.parent / "log.txt").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            watch = MemoryWatch(process)
            code = process.wait()
        path = folder / "rows.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            rows.append(row | watch.peaks_gb(*row.pop("window")))
            record(rows[-1], folder.parent)
        path.unlink(missing_ok=True)
        if code:
            failed.add(way)
            record({"way": way, "failed": stage, "blocks": blocks, "exit": code}, folder.parent)
        if stage == "standard_convert":
            shutil.rmtree(folder / "raw", ignore_errors=True)
    return rows


def record(row: dict[str, Any], folder: Path) -> None:
    """Print a line and keep it."""
    line = json.dumps(row)
    print(line, flush=True)
    with (folder / "results.jsonl").open("a") as file:
        file.write(line + "\n")


def summarize(rows: list[dict[str, Any]]) -> None:
    """Print sums by model size, and lines through the sizes extrapolated to FLUX.1-dev."""
    sizes = sorted({row["weights"] for row in rows})
    for size in sizes:
        print_ratio(f"measured, {size / 1e9:.2f} billion weights", rows, size)
    if len(sizes) < 2:
        return
    full = weights(full_size.FLUX1_DEV)
    extrapolated = []
    for way, stage in dict.fromkeys((row["way"], row["stage"]) for row in rows):
        same = [row for row in rows if (row["way"], row["stage"]) == (way, stage)]
        entry = {"way": way, "stage": stage, "weights": full}
        for column in COLUMNS:
            x, y = [row["weights"] for row in same], [row.get(column, 0) for row in same]
            entry[column] = round(float(np.polyval(np.polyfit(x, y, 1), full)), 1)
        extrapolated.append(entry)
        print(json.dumps({"extrapolated": True, "measured_sizes": len(same)} | entry))
    print_ratio(f"EXTRAPOLATED to {full / 1e9:.2f} billion weights", extrapolated, full)


def print_ratio(label: str, rows: list[dict[str, Any]], size: int) -> None:
    """Print sums of seconds, peaks of memory, and standard way by ours."""
    columns = {}
    for way in ("standard", "ours"):
        mine = [row for row in rows if (row["way"], row["weights"]) == (way, size)]
        calibration = sum(
            row["seconds"] if row["stage"] == "calibrate" else row.get("of_which_calibration", 0)
            for row in mine
        )
        columns[way] = {
            "seconds_without_calibration": sum(row["seconds"] for row in mine) - calibration,
            "calibration": calibration,
            "peak_held_gb": max((row["peak_held_gb"] for row in mine), default=0),
            "peak_resident_gb": max((row["peak_resident_gb"] for row in mine), default=0),
        }
    standard, ours = columns["standard"], columns["ours"]
    for name in standard:
        ratio = standard[name] / ours[name] if ours[name] else float("nan")
        print(f"{label}: {name} {standard[name]:.1f} / {ours[name]:.1f} = {ratio:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if min(arguments.blocks) < MIN_BLOCKS:
        parser.error(f"--blocks {min(arguments.blocks)}: the least is {MIN_BLOCKS}")
    if arguments.stage:
        (blocks,) = arguments.blocks
        STAGES[arguments.stage](arguments.folder, truncated(blocks))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "log.txt"):
        (arguments.folder / name).unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rows += measure(Path(folder), blocks)
    summarize(rows)


if __name__ == "__main__":
    main()
