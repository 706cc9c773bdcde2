"""The four stages as the nodes run them: skip what is up to date, otherwise call down."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management

from . import paths
from .errors import EngineOutdatedError, RebuildError

if TYPE_CHECKING:
    from ..quant.calibration import CalibrationSet
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from ..quant.recipe import QuantizeOptions
    from ..quant.sources.source import FluxSource
    from ..trt_runtime.manifest import EngineManifest
    from ..trt_runtime.run_history import RunHistory
    from ..trt_runtime.spec import BuildSpec
    from .engine_model import EngineOptions
    from .engine_patcher import EnginePatcher
    from .progress import NodeProgress

logger = logging.getLogger(__name__)

QUANTIZE_BYTES = 3 * 2**30
"""GPU memory that quantization of FLUX.1-dev wants: one double block in bf16 (0.7 GB), its copies
while scales are searched, and the activations of a few dozen samples."""


def quantize(
    source: FluxSource,
    destination: Path,
    calibration: CalibrationSet,
    options: QuantizeOptions,
    progress: NodeProgress,
) -> QuantizedCheckpoint:
    """Quantize `source` to `destination`, on the GPU if there is one."""
    from ..quant.quantize import quantize_checkpoint

    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(QUANTIZE_BYTES, device)
    statistics = paths.statistics_folder()
    with run_history().recording() as record:
        return quantize_checkpoint(
            source,
            destination,
            calibration,
            options,
            statistics,
            progress,
            str(device),
            record=record,
        )


def export(checkpoint: Path, progress: NodeProgress) -> tuple[Path, ...]:
    """Write or refresh the ONNX files beside a quantized checkpoint."""
    from ..quant.onnx_export import export_blocks

    with run_history().recording() as record:
        return export_blocks(checkpoint, progress, record)


def export_transformer(checkpoint: Path, progress: NodeProgress) -> Path:
    """Write the whole transformer as one ONNX file beside a quantized checkpoint."""
    from ..quant.onnx_export import export_transformer

    return export_transformer(checkpoint, progress)


def build(
    checkpoint: Path, spec: BuildSpec, workers: int, progress: NodeProgress
) -> tuple[Path, EngineManifest]:
    """Build what is missing of an engine; return its folder and manifest."""
    from ..trt_runtime.builder import build_engine

    with run_history().recording() as record:
        manifest = build_engine(checkpoint.parent, spec, progress, workers, record)
    return checkpoint.parent / spec.folder_name, manifest


def run_history() -> RunHistory:
    """Return how long the stages took on this machine."""
    from ..trt_runtime.backend import probe_gpu
    from ..trt_runtime.run_history import RunHistory, machine_identity

    gpu = probe_gpu(comfy.model_management.get_torch_device()).name
    return RunHistory(paths.durations_folder(), machine_identity(gpu))


def rebuild_if_stale(engine: Path, progress: NodeProgress) -> None:
    """Export and build an engine again if only that helps, for what it was built for.

    Raises:
        RebuildError: It could not be built.
    """
    from ..quant.onnx_export import export_missing
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from ..trt_runtime.rebuild import rebuild_stale

    checkpoint = paths.engine_checkpoint(engine)
    digest = QuantizedCheckpoint.read(checkpoint).metadata.content_digest
    export_it = partial(export_missing, checkpoint, progress)
    for result in rebuild_stale(engine.parent, digest, export_it, progress, [engine]):
        if result.fault:
            raise RebuildError([], {result.name: result.fault})


def load(engine: Path, backend: str, options: EngineOptions) -> EnginePatcher:
    """Open an engine as MODEL.

    Args:
        engine: Folder with the manifest.
        backend: ``auto`` or the name of a backend.
        options: How it shall run.

    Raises:
        EngineOutdatedError: The checkpoint beside it was quantized again after the build.
    """
    arguments = (str(engine), backend, options)
    patcher = load_engine_model(*arguments)
    # ComfyUI's multi-GPU nodes load the model a second time through this.
    patcher.cached_patcher_init = (load_engine_model, arguments)
    return patcher


def load_engine_model(
    engine_folder: str,
    backend: str,
    options: EngineOptions,
    disable_dynamic: bool = False,
) -> EnginePatcher:
    """Return a fresh patcher over an engine folder.

    Args:
        engine_folder: Folder with the manifest.
        backend: ``auto`` or the name of a backend.
        options: How it shall run.
        disable_dynamic: Part of ComfyUI's factory signature; an engine is never dynamic.
    """
    from ..quant.flux.config import block_linears
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from ..trt_runtime.engine import Engine
    from ..trt_runtime.part_times import PartTimes
    from .engine_model import build_engine_model
    from .engine_patcher import EnginePatcher

    del disable_dynamic
    folder = Path(engine_folder)
    times = PartTimes()
    with times.part("header of the checkpoint"):
        checkpoint = QuantizedCheckpoint.read(paths.engine_checkpoint(folder))
    load_device = comfy.model_management.get_torch_device()
    with times.part("checks of the engine"):
        engine = Engine.open(folder, backend, load_device, options.cuda_graphs)
    if engine.manifest.checkpoint_digest != checkpoint.metadata.content_digest:
        raise EngineOutdatedError(paths.engine_name(folder), checkpoint.name)
    offload_device = comfy.model_management.unet_offload_device()
    with times.part("PyTorch model and weights"):
        model = build_engine_model(
            checkpoint.metadata.config.unet_config(),
            checkpoint.high_precision_state_dict(),
            engine,
            {block: block_linears(block) for block in checkpoint.metadata.config.block_names},
            checkpoint,
            engine.manifest.profile.max_txt_tokens,
            load_device,
            options,
        ).to(offload_device)
    logger.info("Opened %s in %s; its plans are loaded to sample", paths.engine_name(folder), times)
    return EnginePatcher(model, load_device, offload_device)
