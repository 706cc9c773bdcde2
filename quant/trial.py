"""A small model cut out of a checkpoint, which takes the way of the whole one in seconds.

It has one block of each kind with the corners of the checkpoint's own weights. Everything runs as
for the whole checkpoint, so what each kind of work takes per unit can be told before hours are
spent.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .calibration import CalibrationSet, Conditioning, rectified_flow_samples
from .flux.config import FluxConfig
from .flux.model import tensor_shapes
from .nvfp4 import NVFP4Weight
from .onnx_export import export_blocks
from .progress import Progress, Record, unrecorded
from .quantize import quantize_checkpoint
from .recipe import FormatBudget, QuantizeOptions
from .sources.source import FluxSource

WIDTH = 1536
"""Of a token in the trial: half of FLUX.1's. With `MLP_RATIO` a trial quantizes 30 million weights,
a four hundredth of FLUX.1-dev's."""

WARM_UP_WIDTH = 256
"""Of a first round that only loads libraries."""

MLP_RATIO = 0.125
"""Linears keep one long side, as in the whole model, with fewer weights in all."""

_SIDE, _TEXT_TOKENS, _TIMESTEPS = 64, 64, 1
"""Latent of 1,024 tokens: with a few, loading a block takes longer than running it."""

_PICTURES = 2
"""Training needs one to learn from and one to be judged by."""

_TRAINING_STEPS = 2

_REACHED_FLOOR = 0.01
"""A budget for recipe ``auto`` that any block keeps: which formats it chooses does not matter."""


class CutSource(FluxSource):
    """The corner of every tensor of a FLUX transformer, with one block of each kind.

    Args:
        source: What is cut.
        width: Of a token; at most the model's.
    """

    layout = "model"

    def __init__(self, source: FluxSource, width: int) -> None:
        self._source = source
        config = source.config
        width = min(width, config.hidden_size)
        self.config: FluxConfig = config.model_copy(
            update={
                "hidden_size": width,
                "num_heads": width // config.head_dim,
                "mlp_ratio": MLP_RATIO,
                "depth": 1,
                "depth_single_blocks": 1,
            }
        )
        self.name = source.name
        self.shapes = tensor_shapes(self.config)
        self.size_bytes = sum(
            torch.Size(shape).numel() * self.dtype(name).itemsize
            for name, shape in self.shapes.items()
        )

    def dtype(self, name: str) -> torch.dtype:
        """See ``FluxSource``."""
        return self._source.dtype(name)

    def tensors(self, names: Iterable[str], device: str = "cpu") -> dict[str, Tensor]:
        """See ``FluxSource``."""
        return {
            # a copy: the tensor that it is cut from is many times larger
            name: tensor[tuple(map(slice, self.shapes[name]))].clone()
            for name, tensor in self._source.tensors(names, device).items()
        }

    def packed(self, linear: str, device: str = "cpu") -> NVFP4Weight | None:
        """Return None: a corner of a stored weight is stored anew."""
        return None

    def digest(self) -> str:
        """See ``FluxSource``."""
        return f"{self.config.hidden_size} of {self._source.digest()}"


def trial_run(
    source: FluxSource,
    options: QuantizeOptions,
    folder: Path,
    progress: Progress,
    device: str,
    record: Record,
) -> Path:
    """Calibrate, quantize and export a small part of a checkpoint.

    Args:
        source: The whole checkpoint.
        options: As for the whole.
        folder: Is filled with about 200 MB.
        progress: Called as by the stages; may raise to cancel.
        device: Where to compute.
        record: Told how long each block took, once libraries are loaded.

    Returns:
        The quantized checkpoint, with its ONNX files beside it.

    Raises:
        QuantError: As of the stages.
    """
    _run(source, WARM_UP_WIDTH, options, folder / "warm-up", progress, device, unrecorded)
    return _run(source, WIDTH, options, folder / "trial", progress, device, record)


def _run(
    source: FluxSource,
    width: int,
    options: QuantizeOptions,
    folder: Path,
    progress: Progress,
    device: str,
    record: Record,
) -> Path:
    if options.recipe.auto is not None:
        budget = FormatBudget(floor_db=_REACHED_FLOOR)
        recipe = options.recipe.model_copy(update={"auto": budget})
        options = options.model_copy(update={"recipe": recipe})
    if options.recipe.training is not None:
        training = options.recipe.training.model_copy(update={"steps": _TRAINING_STEPS})
        recipe = options.recipe.model_copy(update={"training": training})
        options = options.model_copy(update={"recipe": recipe})
    cut, path = CutSource(source, width), folder / f"{folder.name}.safetensors"
    quantize_checkpoint(
        cut,
        path,
        _samples(cut.config),
        options,
        folder / "statistics",
        progress,
        device,
        record=record,
    )
    export_blocks(path, progress, record)
    return path


def _samples(config: FluxConfig) -> CalibrationSet:
    generator = torch.Generator().manual_seed(0)
    extra = config.in_channels - config.out_channels
    condition = Conditioning(
        torch.randn(1, _TEXT_TOKENS, config.context_in_dim, generator=generator),
        None,
        1.0 if config.guidance_embed else None,
        torch.randn(_PICTURES, extra, _SIDE, _SIDE, generator=generator) if extra else None,
    )
    latents = torch.randn(_PICTURES, config.out_channels, _SIDE, _SIDE, generator=generator)
    return rectified_flow_samples(latents, [condition], _TIMESTEPS, 0)
