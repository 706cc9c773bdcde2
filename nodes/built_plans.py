"""Engines run other forms of their blocks once plans for them exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .progress import progress_of_running_node

if TYPE_CHECKING:
    from ..trt_runtime.selection import Selection
    from .engine_model import ModelEngine


def use_built(engine: ModelEngine, selection: Selection) -> None:
    """Have an engine run a selection; builds the plans that are missing, with progress.

    Raises:
        EngineError: A build failed; plans that were finished before are kept.
    """
    from ..trt_runtime.errors.engine import VariantPlanMissingError
    from ..trt_runtime.resources import AUTOMATIC
    from ..trt_runtime.variant_plans import build_selected

    try:
        # looks for the plans itself, which reads every ONNX file
        engine.use(selection)
    except VariantPlanMissingError:
        progress = progress_of_running_node()
        build_selected(engine.folder, selection, progress, AUTOMATIC)
        progress.show("")
        engine.use(selection)
