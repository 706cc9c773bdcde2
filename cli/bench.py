"""Command `bench`: what an engine's blocks take on this machine, beside bf16 in PyTorch."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bench_gemms, explain
from .errors import OptionError, OutdatedEngineError
from .folders import existing_checkpoint, existing_engine, model_folders

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..quant.flux.config import FluxConfig
    from ..quant.roofline.work import StepSizes
    from ..trt_runtime.benchmark import Baseline, EngineTiming, Spread
    from ..trt_runtime.engine import Engine
    from .bench_bounds import MeasuredBound

BACKENDS = ("auto", "tensorrt_rtx", "tensorrt", "reference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "engine",
        nargs="?",
        help="name of an engine in --models: CHECKPOINT/TARGET; --explain and --gemms need none",
    )
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument("--width", type=int, default=1024, help="in pixels (default: 1024)")
    parser.add_argument("--height", type=int, default=1024, help="in pixels (default: 1024)")
    parser.add_argument("--batch", type=int, default=1, help="pictures per call (default: 1)")
    parser.add_argument("--text-tokens", type=int, default=512, help="of a prompt (default: 512)")
    parser.add_argument(
        "--warm-up", type=int, default=3, help="passes that do not count (default: 3)"
    )
    parser.add_argument(
        "--repetitions", type=int, default=10, help="passes that count (default: 10)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="also draw them there")
    parser.add_argument(
        "--gemms",
        action="store_true",
        help="measure the matrix products of --model in bf16, FP8 and NVFP4, without an engine",
    )
    explain.add_arguments(parser)


def run(chosen: argparse.Namespace) -> int:
    """Measure and print, or explain."""
    sizes = _sizes(chosen)
    if chosen.explain:
        return explain.explain(chosen, sizes)
    if chosen.gemms:
        return bench_gemms.measure(chosen, sizes)
    if chosen.engine is None:
        raise OptionError("ENGINE", "none was named; --explain and --gemms work without")
    folders = model_folders(chosen.models)
    folder = existing_engine(folders, chosen.engine)
    checkpoint = existing_checkpoint(folders, folder.parent.name)

    from ..quant.chart_style import save_chart
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from ..quant.roofline.subjects import checkpoint_subject
    from ..trt_runtime.benchmark import CallSizes, measure_engine
    from ..trt_runtime.engine import Engine
    from .bench_bounds import measured_bound
    from .progress import CommandProgress

    metadata = QuantizedCheckpoint.read(checkpoint).metadata
    engine = Engine.open(folder, chosen.backend)
    if engine.manifest.checkpoint_digest != metadata.content_digest:
        raise OutdatedEngineError(chosen.engine)
    device, calls = _device(engine), CallSizes(**asdict(sizes))
    baselines = _baselines(metadata.config, device)
    with CommandProgress() as progress:
        timing = measure_engine(
            engine, calls, baselines, device, chosen.warm_up, chosen.repetitions, progress
        )
    subject = checkpoint_subject(checkpoint.stem, metadata).running()
    bound = measured_bound(subject, sizes, device)
    report = _report(chosen, engine, timing, device, sizes, bound)
    _show(report, timing, bound)
    if chosen.chart is not None:
        save_chart(_chart(report, timing, bound), chosen.chart)
    if chosen.json is not None:
        from ..trt_runtime.store import write_atomic

        write_atomic(chosen.json, json.dumps(report, indent=1).encode())
    return 0


def _sizes(chosen: argparse.Namespace) -> StepSizes:
    from ..quant.flux.config import PATCH_PIXELS
    from ..quant.roofline.work import StepSizes

    for option in ("width", "height"):
        pixels = getattr(chosen, option)
        if pixels < PATCH_PIXELS or pixels % PATCH_PIXELS:
            raise OptionError(f"--{option}", f"{pixels} is no multiple of {PATCH_PIXELS}")
    for option in ("batch", "text_tokens", "warm_up", "repetitions"):
        if getattr(chosen, option) < 1:
            name = f"--{option}".replace("_", "-")
            raise OptionError(name, f"{getattr(chosen, option)} is below 1")
    img_tokens = chosen.width * chosen.height // PATCH_PIXELS**2
    return StepSizes(chosen.batch, img_tokens, chosen.text_tokens)


def _device(engine: Engine) -> torch.device:
    import torch

    from ..trt_runtime.backend import REFERENCE

    # plans run on torch's current CUDA device, which the backend was chosen for
    if engine.backend_name == REFERENCE:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _baselines(config: FluxConfig, device: torch.device) -> dict[str, Baseline]:
    """Make one block of each kind in bf16; its time does not depend on its weights."""
    import torch

    from ..quant.flux.blocks import block_from_config

    generator = torch.Generator(device).manual_seed(0)
    baselines = {}
    for kind, depth in (("double", config.depth), ("single", config.depth_single_blocks)):
        if not depth:
            continue
        with torch.device("meta"):
            block = block_from_config(f"{kind}_blocks.0", config)
        block = block.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        baselines[kind] = _call_of(block)
    return baselines


def _call_of(block: torch.nn.Module) -> Baseline:
    """Return a call of a block on inputs by the names of an engine."""
    from ..quant.flux.blocks import DoubleStreamBlock
    from ..quant.onnx_export.contract import DOUBLE_MODULATION, SINGLE_MODULATION

    double = isinstance(block, DoubleStreamBlock)
    streams = ("img", "txt") if double else ("x",)
    modulation = DOUBLE_MODULATION if double else SINGLE_MODULATION

    def call(inputs: Any) -> object:
        mods = tuple(inputs[name] for name in modulation)
        tokens = (inputs[name] for name in streams)
        return block(*tokens, inputs["cos"], inputs["sin"], mods)

    return call


def _report(
    chosen: argparse.Namespace,
    engine: Engine,
    timing: EngineTiming,
    device: torch.device,
    sizes: StepSizes,
    bound: MeasuredBound | None,
) -> dict[str, Any]:
    import torch

    is_cuda = device.type == "cuda"
    kinds = {kind.kind: {**asdict(kind), "ratio": kind.ratio} for kind in timing.kinds}
    return {
        "engine": chosen.engine,
        "built_with": engine.manifest.built_with,
        "targets": engine.manifest.targets,
        "recipe": engine.manifest.recipe,
        "plan_bytes": engine.manifest.plan_bytes,
        "backend": engine.backend_name,
        "backend_reason": engine.backend_reason,
        "device": torch.cuda.get_device_name(device) if is_cuda else f"CPU, {platform.machine()}",
        "threads": None if is_cuda else torch.get_num_threads(),
        "torch": torch.__version__,
        "width": chosen.width,
        "height": chosen.height,
        **asdict(sizes),
        "warm_up": chosen.warm_up,
        "repetitions": chosen.repetitions,
        **asdict(timing),
        "kinds": kinds,
        "ratio": timing.ratio,
        "bound": bound.figures(timing) if bound else None,
    }


def _show(report: dict[str, Any], timing: EngineTiming, bound: MeasuredBound | None) -> None:
    from .tables import print_table

    threads = f" ({report['threads']} threads)" if report["threads"] else ""
    reason = f" because {report['backend_reason']}" if report["backend_reason"] else ""
    print(f"{report['engine']}: {report['recipe']}, built with {report['built_with']}")
    print(f"backend {report['backend']}{reason}; device {report['device']}{threads}")
    print(
        f"{report['width']}x{report['height']} pixels, batch {report['batch']}: "
        f"{report['img_tokens']} image and {report['txt_tokens']} text tokens; "
        f"{report['repetitions']} passes through all blocks"
    )
    header = ("blocks", "first call", "median", "half of all", "bf16 PyTorch", "half of all", "x")
    print_table(header, [*map(_kind_row, timing.kinds), _step_row(timing)])
    gpu = timing.device_bytes
    memory = "" if gpu is None else f", {gpu / 1e6:,.0f} MB of GPU memory were taken in all"
    print(
        f"loaded in {timing.load_seconds:.2f} s; plans {report['plan_bytes'] / 1e6:,.1f} MB, "
        f"weights in memory {timing.weight_bytes / 1e6:,.1f} MB{memory}"
    )
    if bound is not None:
        print("\n".join(bound.lines(timing)))


def _chart(report: dict[str, Any], timing: EngineTiming, bound: MeasuredBound | None) -> np.ndarray:
    from ..quant.roofline.timing_chart import TimedBar, timing_chart

    rows = {
        f"{kind.kind} block": [
            TimedBar(f"engine, {report['backend']}", **asdict(kind.engine)),
            TimedBar("bf16 in PyTorch", **asdict(kind.baseline)),
        ]
        for kind in timing.kinds
    }
    least = {f"{kind} block": seconds for kind, seconds in bound.kinds.items()} if bound else {}
    title = f"{report['engine']} ({report['recipe']}) on {report['device']}"
    return timing_chart(title, rows, least)


def _kind_row(kind: Any) -> tuple[str, ...]:
    return (
        f"{kind.blocks} {kind.kind}, each",
        _milliseconds(kind.first_seconds),
        *_cells(kind.engine),
        *_cells(kind.baseline),
        f"{kind.ratio:.2f}",
    )


def _step_row(timing: EngineTiming) -> tuple[str, ...]:
    computed = f"{_milliseconds(timing.baseline_step)} (sum)"
    return ("all", "", *_cells(timing.step), computed, "", f"{timing.ratio:.2f}")


def _cells(spread: Spread) -> tuple[str, str]:
    # the unit stands once: a range reads better without
    half = f"{spread.low * 1000:.3f} to {_milliseconds(spread.high)}"
    return _milliseconds(spread.median), half


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3f} ms"
