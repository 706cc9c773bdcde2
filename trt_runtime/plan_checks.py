"""What is asked of a plan before and after it is deserialized."""

from __future__ import annotations

import mmap
from typing import Any

import torch

from .errors.run import ExecutionError, PlanValidityError
from .manifest import PlanEntry

TRT_DTYPES = {"bf16": "BF16", "fp16": "HALF", "fp32": "FLOAT"}


def check_validity(trt: Any, runtime: Any, entry: PlanEntry, plan: mmap.mmap) -> None:
    """Ask TensorRT whether a plan can run here; it says more than a failed load does.

    Args:
        trt: The library.
        runtime: Its runtime.
        entry: What the manifest says of the plan.
        plan: Its bytes.

    Raises:
        PlanValidityError: It cannot.
        torch.OutOfMemoryError: For want of memory, to which ComfyUI has an answer.
    """
    if not hasattr(trt, "EngineInvalidityDiagnostics"):
        return
    validity, found = runtime.get_engine_validity(plan)
    if validity != trt.EngineValidity.INVALID:
        return
    # each diagnostic is a bit; none at all means that nothing could be found out
    members = trt.EngineInvalidityDiagnostics.__members__.items()
    reasons = [name for name, member in members if int(member) & int(found)]
    if "INSUFFICIENT_GPU_MEMORY" in reasons:
        raise torch.OutOfMemoryError(f"TensorRT has no GPU memory for block '{entry.block}'")
    if reasons:
        raise PlanValidityError(entry.block, reasons)


def check_signature(trt: Any, entry: PlanEntry, engine: Any) -> None:
    """Compare names, directions and types: the addresses set later are raw pointers.

    Raises:
        ExecutionError: They are not those of the manifest.
    """
    found = {
        (name, engine.get_tensor_mode(name), engine.get_tensor_dtype(name))
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors))
    }
    modes = ((trt.TensorIOMode.INPUT, entry.inputs), (trt.TensorIOMode.OUTPUT, entry.outputs))
    expected = {
        (spec.name, mode, getattr(trt.DataType, TRT_DTYPES[spec.dtype]))
        for mode, specs in modes
        for spec in specs
    }
    if found != expected:
        names = sorted({name for name, _, _ in found ^ expected})
        raise ExecutionError(entry.block, "its signature", [f"unexpected tensors {names}"])
