"""LoRA mode "baked": blocks that a patch touches are quantized again with the patch merged.

    <checkpoint>/baked/<key>/blocks.safetensors    the touched blocks
    <checkpoint>/baked/<key>/double_blocks.0.onnx  their export
    <checkpoint>/baked/<key>/<target>/             their plans

The key is the digest of the patches with their strengths and of the checkpoint, so what was baked
once is found again, and nothing half-made can be taken for another.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from blake3 import blake3

from ..trt_runtime.bakes import BAKES, BLOCKS, KEY_DIGITS, bake_folders
from ..trt_runtime.errors.storage import EngineBusyError
from ..trt_runtime.last_use import last_used, mark_used
from ..trt_runtime.removal import remove_bake
from . import paths
from .built_plans import use_built
from .errors import BakeError
from .patch_digest import update_digest
from .progress import NodeProgress, progress_of_running_node
from .weight_changes import Patch, acting_patches

if TYPE_CHECKING:
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from ..quant.sources.source import FluxSource
    from ..trt_runtime.selection import BakedBlocks

logger = logging.getLogger(__name__)

KEPT = 4
"""Bakes that stay on disk beside a checkpoint. One that touches every block of FLUX.1-dev takes
about 10 GB, half of it plans."""

_VERSION = "1"


def use_baked(model: Any, patches: Mapping[str, Sequence[Patch]], device: torch.device) -> None:
    """Bring an engine's blocks to what the patches say; bakes what is not on disk.

    Without patches that act on a Linear inside plans the engine runs its own blocks.

    Args:
        model: ComfyUI's model object over an engine.
        patches: By full name of the weight.
        device: Where to quantize.

    Raises:
        BakeError: The checkpoint that the engine was quantized from is not there, or its blocks
            were trained.
        StatisticsMissingError: Its calibration statistics are not there.
        WeightChangeError: ComfyUI cannot apply a patch, or it makes a weight NaN or infinite.
        EngineError: A build failed; what was finished is kept.
    """
    from ..trt_runtime.selection import BakedBlocks
    from ..trt_runtime.store import locked, make_folder

    acting, selection = acting_patches(patches, model.plan_linears), model.engine.selection
    if not acting:
        use_built(model.engine, replace(selection, adapters={}, baked=None))
        return
    checkpoint = model.checkpoint
    _check_untrained(checkpoint)
    key = _digest(checkpoint, acting)
    root = checkpoint.path.parent / BAKES
    blocks = [name for name in model.plan_linears if any(f.startswith(f"{name}.") for f in acting)]
    baked = BakedBlocks(root / key[:KEY_DIGITS], tuple(blocks))
    make_folder(root)
    progress = progress_of_running_node()
    with locked(root, lambda: progress("Waiting for another LoRA to be baked", 0, len(blocks))):
        _make_blocks(model, acting, key, baked, device, progress)
        mark_used(baked.folder)
        _remove_oldest(root, baked.folder)
        use_built(model.engine, replace(selection, adapters={}, baked=baked))


def _make_blocks(
    model: Any,
    acting: Mapping[str, Sequence[Patch]],
    key: str,
    baked: BakedBlocks,
    device: torch.device,
    progress: NodeProgress,
) -> None:
    """Quantize and export the touched blocks, as far as they are not there."""
    from ..quant.changed_blocks import quantize_changed_blocks
    from ..quant.onnx_export import export_blocks
    from .changed_source import ChangedSource

    path, checkpoint = baked.folder / BLOCKS, model.checkpoint
    if not _is_quantized(path, checkpoint, key, baked.blocks):
        source = ChangedSource(_source(checkpoint), acting, key)
        # ComfyUI has made room for the engine, and a block at a time needs less of it; freeing
        # memory of others here would unload what is being loaded for the same picture
        model.engine.unload()
        statistics = paths.statistics_folder()
        quantize_changed_blocks(
            source, checkpoint, baked.blocks, path, statistics, progress, str(device)
        )
        progress.show("")
    if not _is_exported(path):
        export_blocks(path, progress)
        progress.show("")


def _check_untrained(checkpoint: QuantizedCheckpoint) -> None:
    metadata = checkpoint.metadata
    if metadata.options.recipe.training is not None or metadata.distillation is not None:
        raise BakeError(
            checkpoint.name,
            f"recipe '{metadata.recipe}' trained its blocks, and baking quantizes without training",
            "Use a checkpoint of another recipe",
        )


def _digest(checkpoint: QuantizedCheckpoint, acting: Mapping[str, Sequence[Patch]]) -> str:
    digest = blake3()
    update_digest(digest, (_VERSION, checkpoint.metadata.content_digest))
    for linear in sorted(acting):
        # the number of patches keeps a name from being read as a part of the patch before it
        update_digest(digest, (linear, len(acting[linear]), list(acting[linear])))
    return digest.hexdigest()


def _is_quantized(
    path: Path, checkpoint: QuantizedCheckpoint, key: str, blocks: Sequence[str]
) -> bool:
    from ..quant.errors.files import QuantizedCheckpointError
    from ..quant.quantized_checkpoint import QuantizedCheckpoint

    if not path.is_file():
        return False
    try:
        found = QuantizedCheckpoint.read(path).metadata
    except QuantizedCheckpointError as error:
        logger.warning("A baked LoRA is baked again: %s", error)
        return False
    expected = (checkpoint.metadata.content_digest, key, tuple(blocks))
    return (found.base_digest, found.source_digest, found.block_names) == expected


def _is_exported(path: Path) -> bool:
    from ..quant.errors.export import OnnxExportMissingError
    from ..quant.onnx_export import exported_blocks

    try:
        exported_blocks(path)
    except OnnxExportMissingError:
        return False
    return True


def _source(checkpoint: QuantizedCheckpoint) -> FluxSource:
    """Open the checkpoint that another was quantized from, wherever it lies now."""
    from ..quant.sources.source import open_source

    metadata = checkpoint.metadata
    if metadata.source_layout == "model":
        raise BakeError(
            checkpoint.name,
            "it was quantized from a MODEL, and no file holds those weights",
            "Quantize a checkpoint file with 'Quantize FLUX to FP4'",
        )
    named = [n for n in paths.source_checkpoints() if Path(n).name == metadata.source_name]
    for name in named:
        source = open_source(paths.source_checkpoint(name))
        if source.digest() == metadata.source_digest:
            return source
    if named:
        reason = f"'{named[0]}' in models/diffusion_models is not the file it was quantized from"
        raise BakeError(checkpoint.name, reason, "Put the original file in its place")
    reason = f"the checkpoint '{metadata.source_name}' that it was quantized from is gone"
    raise BakeError(checkpoint.name, reason, "Put that file back into models/diffusion_models")


def _remove_oldest(root: Path, used: Path) -> None:
    """Keep the bake in use and those that were used last; the caller holds the lock of `root`."""
    # the one in use is not asked for its time: a clock that was set back would make it the oldest
    others = [folder for folder in bake_folders(root) if folder != used]
    for folder in sorted(others, key=last_used, reverse=True)[KEPT - 1 :]:
        with contextlib.suppress(EngineBusyError):
            remove_bake(folder)
