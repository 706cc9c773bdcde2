"""The root of the runtime's errors: each carries its fields and builds the text the user reads."""

from __future__ import annotations

BUILD_NODE = "'Build TensorRT Engine'"
EXPORT_NODE = "'Export FLUX FP4 to ONNX'"
REBUILD = (
    "Set 'if stale' of 'Load FLUX FP4 Engine' to 'rebuild', or run 'rebuild stale' in 'FLUX FP4 "
    "Engine Manager'."
)
"""The shortest way from a stale engine to one that runs."""

MAX_QUOTED = 600


def shortened(text: str) -> str:
    """Cut a text that quotes a file, which may hold names of megabytes, to what can be shown."""
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


class EngineError(Exception):
    """Anything that building, checking, loading or running an engine refuses."""

    def __init_subclass__(cls) -> None:
        """Shorten the class's full name, which ComfyUI shows twice above the text.

        Inside ComfyUI the pack's modules are named by their path on the disk; in the errors panel,
        38 letters wide, that would push the text out of sight.
        """
        super().__init_subclass__()
        cls.__module__ = "flux_fp4"
