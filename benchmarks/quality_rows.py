"""The rows of the quality table: every way to make FP4 of the small model that is compared."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate.state import AcceleratorState, GradientState
from flux_fp4.quant.calibration import CalibrationSet
from flux_fp4.quant.emulation import EmulatedLinear
from flux_fp4.quant.flux.config import block_linears
from flux_fp4.quant.flux.model import Flux
from flux_fp4.quant.quantize import quantize_checkpoint
from flux_fp4.quant.quantized_checkpoint import QuantizedCheckpoint
from flux_fp4.quant.recipe import Format, QuantizeOptions, TrainingOptions, named_recipe
from flux_fp4.quant.sources.source import FluxSource
from flux_fp4.quant.training.accelerators import open_accelerator
from flux_fp4.quant.training.distillation import Distillation, distill
from flux_fp4.quant.training.trainer import DistillationOptions
from flux_fp4.quant.training.trajectories import TrajectoryOptions
from small_model.alternatives import (
    branch_operations,
    comfy_kitchen_model,
    modelopt_model,
    nvfp4_bytes,
)
from small_model.digits import IMAGE_SIZE
from small_model.samples import Digits
from small_model.sampling import TEXT_TOKENS, original_model, quantized_model

CALIBRATION = range(128)
"""Pictures that recipes see; blockwise training learns from 112 of them and is judged by 16."""

DISTILLATION = DistillationOptions(
    training=TrainingOptions(steps=600, learning_rate=5e-3),
    trajectories=TrajectoryOptions(count=2048, kept=10, width=IMAGE_SIZE, height=IMAGE_SIZE),
)
"""With a quarter of these trajectories, held-out prompts lost again after 300 steps."""


@dataclass(frozen=True)
class Made:
    """A quantized model.

    Attributes:
        model: It, emulated.
        plan_bytes: Of the weights of all Linears of blocks.
        extra_operations: Multiplications beside the Linears' own, in parts of those.
        seconds: That it took to make, without calibration.
    """

    model: Flux
    plan_bytes: int
    extra_operations: float
    seconds: float


class Workshop:
    """What rows are made from, and where."""

    def __init__(self, source: FluxSource, digits: Digits, folder: Path) -> None:
        self.source, self.digits, self.folder = source, digits, folder

    def samples(self, pictures: range = CALIBRATION) -> CalibrationSet:
        """Return what recipes see."""
        return self.digits.samples(pictures, seed=0, text_tokens=TEXT_TOKENS)

    def quantize(
        self, name: str, options: QuantizeOptions, pictures: range = CALIBRATION
    ) -> QuantizedCheckpoint:
        """Quantize as a user would; what an earlier row calibrated is used again."""
        return quantize_checkpoint(
            self.source,
            self.folder / name / f"{name}.safetensors",
            self.samples(pictures),
            options,
            self.folder / "statistics",
            lambda phase, done, total: None,
            dtype=torch.float32,
        )

    def distill(self, name: str, base: QuantizedCheckpoint) -> QuantizedCheckpoint:
        """Train a checkpoint against the original, in this process."""
        # accelerate keeps one state for the whole life of a process
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        work = Distillation(
            source=self.source,
            base=base,
            samples=self.samples(),
            destination=self.folder / name / f"{name}.safetensors",
            options=DISTILLATION,
            statistics=self.folder / "statistics",
            folder=self.folder / "training",
            dtype=torch.float32,
        )
        accelerator = open_accelerator("cpu", DISTILLATION.accumulate, None, work.logs)
        return distill(work, accelerator, False, lambda phase, done, total: None)


@dataclass(frozen=True)
class Row:
    """One way to quantize.

    Attributes:
        name: As the tables show it.
        make: Makes it.
    """

    name: str
    make: Callable[[Workshop], Made]

    @property
    def file_name(self) -> str:
        """The name without blanks and commas."""
        return file_name(self.name)


def file_name(name: str) -> str:
    """Return a name without blanks and commas."""
    return name.replace(", ", "-").replace(" ", "-")


def recipe_row(
    recipe: str,
    fp8_attention: bool = True,
    modulation: Format = "bf16",
    refinements: int | None = None,
    distilled: bool = False,
    scale_search: Literal["max", "mse"] | None = None,
    steps: int = 0,
    pictures: range = CALIBRATION,
) -> Row:
    """Return the row of a recipe of the pack; what is named here is not as the recipe has it."""
    parts = [recipe]
    parts += [f"scales by {scale_search}"] if scale_search else []
    parts += [] if refinements is None else [f"{refinements} refinements"]
    parts += [] if fp8_attention else ["bf16 attention"]
    parts += [] if modulation == "bf16" else [f"{modulation} modulation"]
    parts += [f"{steps} steps"] if steps else []
    parts += [] if pictures is CALIBRATION else [f"{len(pictures)} pictures"]
    parts += ["qad"] if distilled else []
    chosen = named_recipe(recipe)
    if refinements is not None:
        assert chosen.low_rank is not None
        low_rank = chosen.low_rank.model_copy(update={"refinements": refinements})
        chosen = chosen.model_copy(update={"low_rank": low_rank})
    if steps:
        assert chosen.training is not None
        training = chosen.training.model_copy(update={"steps": steps})
        chosen = chosen.model_copy(update={"training": training})
    if scale_search:
        chosen = chosen.model_copy(update={"scale_search": scale_search})
    options = QuantizeOptions(recipe=chosen, fp8_attention=fp8_attention, modulation=modulation)
    name = ", ".join(parts)

    def make(workshop: Workshop) -> Made:
        base = file_name(name.removesuffix(", qad"))
        started = time.monotonic()
        checkpoint = workshop.quantize(base, options, pictures)
        if distilled:
            started = time.monotonic()
            checkpoint = workshop.distill(f"{base}-qad", checkpoint)
        seconds = time.monotonic() - started
        return Made(
            quantized_model(workshop.source, checkpoint),
            plan_bytes(checkpoint),
            extra_operations(checkpoint),
            seconds,
        )

    return Row(name, make)


def half_row(weights: bool) -> Row:
    """Return the row of `nvfp4-mse` with only its weights in FP4, or only their inputs."""

    def make(workshop: Workshop) -> Made:
        options = QuantizeOptions(recipe=named_recipe("nvfp4-mse"))
        model = quantized_model(workshop.source, workshop.quantize("nvfp4-mse", options))
        original = original_model(workshop.source)
        for name, module in model.named_modules():
            if not isinstance(module, EmulatedLinear):
                continue
            if weights:
                module.quantize_input = None
            else:
                module.weight = original.get_parameter(f"{name}.weight")
        return Made(model, 0, 0.0, 0.0)

    return Row("weights in FP4, inputs exact" if weights else "inputs in FP4, weights exact", make)


def comfy_kitchen_row() -> Row:
    """Return the row of ComfyUI's own NVFP4."""

    def make(workshop: Workshop) -> Made:
        started = time.monotonic()
        model, size = comfy_kitchen_model(workshop.source)
        return Made(model, size, 0.0, time.monotonic() - started)

    return Row("comfy_kitchen, bf16 attention", make)


def modelopt_row(config: str) -> Row:
    """Return the row of one of ModelOpt's configurations as it comes."""

    def make(workshop: Workshop) -> Made:
        started = time.monotonic()
        model = modelopt_model(workshop.source, config, workshop.samples())
        seconds, rank = time.monotonic() - started, 32 if "SVDQUANT" in config else 0
        return Made(
            model,
            nvfp4_bytes(workshop.source, rank),
            branch_operations(workshop.source, rank),
            seconds,
        )

    return Row(f"ModelOpt {config}, bf16 attention", make)


def plan_bytes(checkpoint: QuantizedCheckpoint) -> int:
    """Count the bytes of all Linears in plans."""
    blocks = ("double_blocks.", "single_blocks.")
    return sum(
        tensor.length
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(blocks) and "mod" not in name
    )


def extra_operations(checkpoint: QuantizedCheckpoint) -> float:
    """Return the operations of low-rank branches in parts of the Linears' own."""
    own = extra = 0
    for block in checkpoint.metadata.block_names:
        for linear in (f"{block}.{part}" for part in block_linears(block)):
            rows, columns = checkpoint.linear_shape(linear)
            own += rows * columns
            branch = checkpoint.tensors.get(f"{linear}.svd_down")
            extra += 0 if branch is None else branch.shape[0] * (rows + columns)
    return extra / own


RECIPES = (
    recipe_row("nvfp4-max"),
    recipe_row("nvfp4-mse"),
    recipe_row("nvfp4-awq"),
    recipe_row("nvfp4-svdquant-r16"),
    recipe_row("nvfp4-svdquant-r32"),
    recipe_row("nvfp4-svdquant-r64"),
    recipe_row("nvfp4-qat"),
    recipe_row("nvfp4-mse", distilled=True),
    recipe_row("nvfp4-fp8mix"),
    recipe_row("auto"),
    recipe_row("fp8"),
)
"""With everything else at its default: attention in FP8, modulation in bf16."""

ATTENTION = (
    recipe_row("nvfp4-max", fp8_attention=False),
    recipe_row("nvfp4-svdquant-r32", fp8_attention=False),
    recipe_row("nvfp4-qat", fp8_attention=False),
    recipe_row("fp8", fp8_attention=False),
)

SCALES = (
    recipe_row("nvfp4-awq", scale_search="max", fp8_attention=False),
    recipe_row("nvfp4-awq", fp8_attention=False),
    recipe_row("nvfp4-qat", scale_search="max"),
    recipe_row("nvfp4-qat"),
)
"""Block scales from the largest value, or searched for the least error of the weight."""

REFINEMENTS = tuple(
    recipe_row("nvfp4-svdquant-r32", fp8_attention=False, refinements=count)
    for count in (0, 1, None, 4, 8, 16)
)
"""How often the branch is fitted again to what rounding has left over; by default twice."""

TRAINING = (
    recipe_row("nvfp4-qat"),
    recipe_row("nvfp4-qat", steps=600),
    recipe_row("nvfp4-qat", pictures=range(512)),
    recipe_row("nvfp4-mse", distilled=True),
)
"""Longer training, more pictures, and that of the whole model."""

MODULATION = (
    recipe_row("nvfp4-mse", modulation="fp8"),
    recipe_row("nvfp4-mse", modulation="nvfp4"),
)

HALVES = (half_row(weights=True), half_row(weights=False))
"""Where the error of `nvfp4-mse` comes from."""

OTHERS = (
    comfy_kitchen_row(),
    modelopt_row("NVFP4_DEFAULT_CFG"),
    recipe_row("nvfp4-mse", fp8_attention=False),
    modelopt_row("NVFP4_AWQ_LITE_CFG"),
    recipe_row("nvfp4-awq", fp8_attention=False),
    modelopt_row("NVFP4_SVDQUANT_DEFAULT_CFG"),
    recipe_row("nvfp4-svdquant-r32", fp8_attention=False),
    recipe_row("nvfp4-svdquant-r32", fp8_attention=False, refinements=16),
)
"""What other software makes, beside what compares with it here."""
