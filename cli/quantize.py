"""Command `quantize`: a FLUX checkpoint to a quantized one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import OptionError
from .folders import model_folders, new_checkpoint, run_history

if TYPE_CHECKING:
    from ..quant.model_folders import ModelFolders
    from ..quant.recipe import QuantizeOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument(
        "source",
        type=Path,
        help="FLUX checkpoint: a safetensors file, or the .index.json of its shards",
    )
    parser.add_argument("destination", help="name of the quantized checkpoint in --models")
    parser.add_argument(
        "--samples",
        type=Path,
        required=True,
        metavar="FILE",
        help="calibration samples that 'FLUX Calibration Samples' saved",
    )
    parser.add_argument(
        "--recipe", default="nvfp4-max", help="a recipe of the pack or of DIR/recipes"
    )
    parser.add_argument("--bf16-attention", action="store_true", help="keep attention out of FP8")
    parser.add_argument("--modulation", default="bf16", choices=("bf16", "fp8", "nvfp4"))
    parser.add_argument("--percentile", type=float, default=100.0)
    parser.add_argument("--headroom", type=float, default=1.25)
    parser.add_argument("--quality-floor", type=float, default=0.0, metavar="DB")
    parser.add_argument("--size-limit", type=float, default=0.0, metavar="GIB")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(chosen: argparse.Namespace) -> int:
    """Quantize, unless the destination is up to date."""
    from ..quant.calibration_files import load_samples
    from ..quant.quantize import quantize_checkpoint
    from ..quant.quantized_checkpoint import up_to_date_checkpoint
    from ..quant.sources.source import open_source
    from ..quant.summary import quantized_summary
    from .progress import CommandProgress

    folders = model_folders(chosen.models)
    destination = new_checkpoint(folders, chosen.destination)
    options = _options(chosen, folders)
    device = chosen_device(chosen.device)
    source, samples = open_source(chosen.source), load_samples(chosen.samples)
    quantized = up_to_date_checkpoint(source, destination, options, samples.digest())
    if quantized is None:
        with CommandProgress() as progress, run_history(folders).recording() as record:
            quantized = quantize_checkpoint(
                source,
                destination,
                samples,
                options,
                folders.statistics,
                progress,
                device,
                record=record,
            )
    print(quantized_summary(quantized))
    return 0


def _options(chosen: argparse.Namespace, folders: ModelFolders) -> QuantizeOptions:
    from pydantic import ValidationError

    from ..quant.recipe import RECIPES, named_recipe, quantize_options, read_recipe

    own = None if chosen.recipe in RECIPES else folders.recipe(chosen.recipe)
    recipe = named_recipe(chosen.recipe) if own is None else read_recipe(own)
    try:
        return quantize_options(
            recipe,
            not chosen.bf16_attention,
            chosen.modulation,
            chosen.percentile,
            chosen.headroom,
            chosen.quality_floor,
            chosen.size_limit,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = f"--{first['loc'][-1]}".replace("_", "-") if first["loc"] else "of the recipe"
        raise OptionError(option, first["msg"]) from error


def chosen_device(chosen: str) -> str:
    """Return the device of torch that an option names.

    Raises:
        OptionError: It is "cuda" and there is none.
    """
    import torch

    usable = torch.cuda.is_available()
    if chosen == "cuda" and not usable:
        raise OptionError("--device", "torch finds no CUDA GPU")
    return "cuda" if usable and chosen != "cpu" else "cpu"
