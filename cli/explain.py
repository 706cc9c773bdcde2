"""`bench --explain`: the least time that a step can take on a GPU, without running anything."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .errors import OptionError
from .folders import existing_checkpoint, existing_engine, model_folders

if TYPE_CHECKING:
    from ..quant.roofline.gpus import GpuPeaks
    from ..quant.roofline.subjects import Subject
    from ..quant.roofline.work import StepSizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what explaining takes beside the sizes of `bench`."""
    group = parser.add_argument_group("explaining")
    group.add_argument(
        "--explain",
        action="store_true",
        help="run nothing: show the least time of a step by part, and what bounds it",
    )
    group.add_argument("--gpu", help="name of a GPU, such as 'GeForce RTX 5080' (default: this)")
    group.add_argument(
        "--model",
        default="flux1-dev",
        help="a published model, where no engine is named (default: flux1-dev)",
    )
    group.add_argument(
        "--recipe",
        default="nvfp4-max",
        help="a recipe of the pack, where no engine is named (default: nvfp4-max)",
    )
    group.add_argument(
        "--bf16-attention", action="store_true", help="where no engine is named: not in FP8"
    )
    group.add_argument("--steps", type=int, default=20, help="of a picture (default: 20)")
    group.add_argument(
        "--lora-rank", type=int, default=0, help="of all LoRAs at run time together (default: 0)"
    )
    group.add_argument(
        "--modulation-on-gpu", action="store_true", help="modulation weights stay on the GPU"
    )


def explain(chosen: argparse.Namespace, sizes: StepSizes) -> int:
    """Print the bound of what was chosen."""
    from ..quant.roofline.bounds import step_bound
    from ..quant.roofline.report import bound_text
    from ..trt_runtime.spec import MAX_LORA_RANK

    if chosen.steps < 1:
        raise OptionError("--steps", f"{chosen.steps} is below 1")
    if not 0 <= chosen.lora_rank <= MAX_LORA_RANK:
        raise OptionError("--lora-rank", f"{chosen.lora_rank} is not from 0 to {MAX_LORA_RANK}")
    subject = _subject(chosen).running(chosen.lora_rank, chosen.modulation_on_gpu)
    gpu = chosen_gpu(chosen.gpu)
    bound = step_bound(subject.config, sizes, subject.options, gpu, chosen.steps)
    print(bound_text(subject.name, bound, sizes, chosen.steps))
    if chosen.chart is not None:
        from ..quant.chart_style import save_chart
        from ..quant.roofline.chart import bound_chart

        save_chart(bound_chart(subject.name, bound), chosen.chart)
    return 0


def _subject(chosen: argparse.Namespace) -> Subject:
    from ..quant.quantized_checkpoint import QuantizedCheckpoint
    from ..quant.recipe import QuantizeOptions, named_recipe
    from ..quant.roofline.subjects import checkpoint_subject, published_subject

    if chosen.engine is None:
        model = published_name(chosen.model)
        recipe = named_recipe(chosen.recipe)
        options = QuantizeOptions(recipe=recipe, fp8_attention=not chosen.bf16_attention)
        return published_subject(model, options)
    folders = model_folders(chosen.models)
    name = existing_engine(folders, chosen.engine).parent.name
    metadata = QuantizedCheckpoint.read(existing_checkpoint(folders, name)).metadata
    return checkpoint_subject(name, metadata)


def published_name(model: str) -> str:
    """Return the name of a published model.

    Raises:
        OptionError: There is no such model.
    """
    from ..quant.roofline.published import PUBLISHED

    if model not in PUBLISHED:
        raise OptionError("--model", f"{model!r} is none of {', '.join(PUBLISHED)}")
    return model


def chosen_gpu(name: str | None) -> GpuPeaks:
    """Return the peaks of a GPU by name, or of this machine's."""
    import torch

    from ..quant.roofline.gpus import device_peaks, gpu_peaks

    if name is not None:
        return gpu_peaks(name)
    if not torch.cuda.is_available():
        raise OptionError("--gpu", "there is no CUDA GPU here, so one has to be named")
    return device_peaks(torch.cuda.current_device())
