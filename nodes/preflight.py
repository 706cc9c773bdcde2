"""Node: what quantizing and building a checkpoint will take, and what stands in the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
from comfy_api.latest import io, ui

from ..trt_runtime.targets import TARGETS, build_spec
from . import paths
from .build import TARGET
from .errors import PreflightError
from .failures import told
from .machine import Machine, folder_problems, gigabytes, memory_problems
from .quantize import NAME, source_input, source_state
from .recipe_inputs import ADVANCED, FP8_ATTENTION, options_from, recipe_input, recipe_state
from .schema import CATEGORY, description

if TYPE_CHECKING:
    from ..quant.needs import Needs
    from ..quant.recipe import QuantizeOptions
    from ..quant.sources.source import FluxSource
    from .progress import NodeProgress


class Preflight(io.ComfyNode):
    """Says what quantizing a FLUX checkpoint and building its engine will take on this machine,
    before hours and gigabytes are spent: time, disk and memory of every stage, whether the GPU fits
    the recipe, and what would stop the work. Nothing is written."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FluxFP4Preflight",
            display_name="FLUX FP4 Preflight",
            category=CATEGORY,
            description=description(Preflight),
            search_aliases=["fp4", "nvfp4", "disk space", "requirements", "check", "memory"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[source_input(), NAME, recipe_input(), FP8_ATTENTION, TARGET, *ADVANCED],
            outputs=[io.String.Output(display_name="report", tooltip="The report as plain text.")],
        )

    @classmethod
    def fingerprint_inputs(
        cls, checkpoint: str | None, recipe: str | None, **_options: Any
    ) -> tuple[Any, ...]:
        # what is free changes at any time: look again in every run
        return source_state(checkpoint), recipe_state(recipe), float("nan")

    @classmethod
    @told
    def execute(
        cls,
        checkpoint: str,
        name: str,
        recipe: str,
        fp8_attention: bool,
        target: str,
        **advanced: Any,
    ) -> io.NodeOutput:
        from ..quant.sources.source import open_source
        from .progress import NodeProgress

        source = open_source(paths.source_checkpoint(checkpoint))
        options = options_from(recipe, fp8_attention, **advanced)
        text = report(source, options, target, paths.new_checkpoint(name).parent)
        progress = NodeProgress(cls.hidden.unique_id)
        text += "\n" + "\n".join(stage_seconds(source, options, target, progress))
        progress.show(text)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def require(source: FluxSource, options: QuantizeOptions, target: str | None, folder: Path) -> None:
    """Refuse work that cannot be finished on this machine.

    Args:
        source: What would be quantized.
        options: How.
        target: Name of the engine's target; None: no engine is built yet.
        folder: Where checkpoint and engine would go.

    Raises:
        PreflightError: It lists every problem.
    """
    from ..quant.needs import needs_of

    needs = needs_of(source, options)
    found = problems(source, options, target, folder, needs, Machine.at(folder))
    if found:
        raise PreflightError(folder.name, found)


def problems(
    source: FluxSource,
    options: QuantizeOptions,
    target: str | None,
    folder: Path,
    needs: Needs,
    machine: Machine,
) -> list[str]:
    """Return what would stop the work, as sentences."""
    # the work goes on with this file or frees it; others stay until their successors are whole
    unfinished = folder / f".{folder.name}.partial"
    present = unfinished.stat().st_size if unfinished.is_file() else 0
    disk = needs.disk if target else needs.checkpoint + needs.statistics
    found = folder_problems(machine, folder, max(0, disk - present))
    found += memory_problems(machine, max(needs.memory, _worker_bytes(needs) if target else 0))
    return found + (_target_problems(source, options, target) if target else [])


def report(source: FluxSource, options: QuantizeOptions, target: str, folder: Path) -> str:
    """Return the plan of work with its sizes, and the problems."""
    from ..quant.needs import needs_of

    needs, machine = needs_of(source, options), Machine.at(folder)
    gpus, backend, _ = TARGETS[target]
    lines = [
        f"{source.name}: {source.config.variant}, {source.layout}, {gigabytes(source.size_bytes)}",
        f"Quantize with {options.recipe.name}: {gigabytes(needs.checkpoint)} in '{folder.name}', "
        f"{gigabytes(needs.statistics)} of statistics; {gigabytes(needs.memory)} of main memory",
        f"Build for {target} ({gpus}) with {backend}: {len(source.config.block_names)} plans, "
        f"about {gigabytes(needs.plans)}; {gigabytes(_worker_bytes(needs))} of main memory per "
        "worker",
        f"Disk: {gigabytes(needs.disk)} needed, {gigabytes(machine.free_disk)} free. Main memory: "
        f"{gigabytes(machine.free_memory)} free",
        f"GPU of this machine: {_gpu_sentence(target)}",
    ]
    found = problems(source, options, target, folder, needs, machine)
    lines += [f"PROBLEM: {problem}" for problem in found] or ["Nothing stands in the way."]
    return "\n".join(lines)


def stage_seconds(
    source: FluxSource, options: QuantizeOptions, target: str, progress: NodeProgress
) -> list[str]:
    """Return how long each stage will take, as sentences."""
    from ..quant.needs import needs_of
    from .estimates import Work, stage_lines
    from .stages import run_history

    # the sizes of the largest pictures change what plans need, not what building them takes
    spec = build_spec(target, 2.0, 1, 512)
    device = str(comfy.model_management.get_torch_device())
    work = Work(source, options, needs_of(source, options), spec, device)
    return stage_lines(work, run_history(), progress)


def _worker_bytes(needs: Needs) -> int:
    from ..trt_runtime.resources import WORKER_BYTES

    return WORKER_BYTES + 2 * needs.largest_plan


def _target_problems(source: FluxSource, options: QuantizeOptions, target: str) -> list[str]:
    from ..quant.flux.config import block_linears
    from ..trt_runtime.backend import load_backend
    from ..trt_runtime.builder import BlockFormats, check_formats
    from ..trt_runtime.errors import EngineError

    _, backend, sms = TARGETS[target]
    block = source.config.block_names[0]
    formats = [options.recipe.format_of(f"{block}.{linear}") for linear in block_linears(block)]
    wanted = BlockFormats(
        block, "nvfp4" in formats, "fp8" in formats, options.fp8_attention, "bf16"
    )
    try:
        load_backend(backend)
        for sm in sms:
            check_formats(sm, wanted)
    except EngineError as error:
        return [str(error)]
    return []


def _gpu_sentence(target: str) -> str:
    from ..trt_runtime.backend import probe_gpu

    gpu = probe_gpu(comfy.model_management.get_torch_device())
    if gpu.problem:
        return f"{gpu.problem}; the engine can be built here, and runs on the slow CPU reference"
    if gpu.sm in TARGETS[target][2]:
        return f"{gpu.name} ({gpu.sm}) runs this target"
    return f"{gpu.name} ({gpu.sm}) does not run this target; it can be built for another machine"
