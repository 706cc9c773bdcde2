"""The root of the errors of quantization and export; each text says what, limit, next step."""

from __future__ import annotations

MAX_QUOTED = 600


def shortened(text: str) -> str:
    """Cut a text that quotes a file, which may hold names of megabytes, to what can be shown."""
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


class QuantError(Exception):
    """Root of every error that quantization and export raise on purpose."""

    def __init_subclass__(cls) -> None:
        """Shorten the class's full name, which ComfyUI shows twice above the text.

        Inside ComfyUI the pack's modules are named by their path on the disk; in the errors panel,
        38 letters wide, that would push the text out of sight.
        """
        super().__init_subclass__()
        cls.__module__ = "flux_fp4"
