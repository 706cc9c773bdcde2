"""Errors about loading plans and running them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import BUILD_NODE, EngineError


class ShapeProfileError(EngineError):
    """Token counts outside the range that an engine was built for.

    Attributes:
        label: What the tokens are: ``text``, ``image``, or ``image and text``.
        tokens: How many there are.
        minimum: How many the engine takes at least.
        maximum: How many it takes at most.
        widget: Widget of the build node that raises the maximum; there is none for the minimum.
    """

    def __init__(self, label: str, tokens: int, minimum: int, maximum: int, widget: str) -> None:
        self.label, self.tokens, self.minimum, self.maximum = label, tokens, minimum, maximum
        self.widget = widget
        is_text = label == "text"
        # one image token is 16 x 16 pixels, the widget counts in 1024 x 1024; what is needed is
        # rounded up and what there is down, so that the two never look equal
        needed, allowed = -(-tokens * 100 // 4096) / 100, maximum * 100 // 4096 / 100
        size = "" if is_text else f" ({needed:.2f} megapixels, reference pictures included)"
        limit = "" if is_text else f" ({allowed:.2f} megapixels)"
        if tokens < minimum:
            remedy = "Use a longer prompt." if is_text else "Make the picture larger."
        else:
            remedy = "Use a shorter prompt" if is_text else "Make the picture smaller"
            remedy += f", or build again with a larger '{widget}' in {BUILD_NODE}."
        super().__init__(
            f"This run needs {tokens} {label} tokens{size}. The engine takes {minimum} to "
            f"{maximum}{limit}. {remedy}"
        )


class BlockInputError(EngineError):
    """Inputs that do not match a block's signature."""

    def __init__(self, block: str, problem: str) -> None:
        self.block, self.problem = block, problem
        super().__init__(
            f"Block '{block}' cannot run: {problem}. Another node changed what goes into it: "
            "bypass nodes that patch blocks, or use 'Load Diffusion Model' for this MODEL."
        )


class AdapterError(EngineError):
    """Low-rank factors that do not fit a Linear."""

    def __init__(self, block: str, linear: str, problem: str) -> None:
        self.block, self.linear, self.problem = block, linear, problem
        super().__init__(
            f"The LoRA for '{block}.{linear}' cannot be used: {problem}. Use fewer or smaller "
            "LoRAs, or choose 'baked' as 'lora' in 'Load FLUX FP4 Engine'."
        )


class EngineNotLoadedError(EngineError):
    """A run before load() or after unload()."""

    def __init__(self, block: str) -> None:
        self.block = block
        super().__init__(
            f"Block '{block}' cannot run: the engine is not loaded. Queue the workflow again to "
            "load it."
        )


class SelfTestError(EngineError):
    """A block computes something else on this GPU than its ONNX file says."""

    def __init__(self, block: str, db: float, limit_db: float, report: Path) -> None:
        self.block, self.db, self.limit_db, self.report = block, db, limit_db, report
        found = f"{db:.1f} dB" if db > -1000 else "values that are not finite"
        super().__init__(
            f"The engine is not used: on this GPU block '{block}' gives {found} against the "
            f"reference, at least {limit_db:.0f} dB are needed. Update the NVIDIA driver and "
            f"build again with {BUILD_NODE}. If it stays, report it with '{report.name}' from the "
            "engine's folder; until then choose 'reference' as 'backend'."
        )


class PlanValidityError(EngineError):
    """TensorRT says itself that a plan does not run here."""

    def __init__(self, block: str, reasons: Sequence[str]) -> None:
        self.block, self.reasons = block, tuple(reasons)
        is_driver = {"OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "CUDA_ERROR"} & set(reasons)
        remedy = "Update the NVIDIA driver." if is_driver else f"Build it again with {BUILD_NODE}."
        super().__init__(
            f"TensorRT refuses the plan of block '{block}' on this machine: "
            f"{', '.join(reasons).lower().replace('_', ' ')}. "
            f"{remedy}"
        )


class ExecutionError(EngineError):
    """TensorRT refused to load or to run a verified plan."""

    def __init__(self, block: str, step: str, messages: Sequence[str]) -> None:
        self.block, self.step, self.messages = block, step, tuple(messages)
        super().__init__(
            f"TensorRT failed at block '{block}' in {step}: "
            f"{'; '.join(self.messages) or 'no reason given'}. "
            f"Queue again; if it stays, build the engine again with {BUILD_NODE}."
        )
