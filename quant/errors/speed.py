"""Errors about what a GPU could do."""

from __future__ import annotations

from collections.abc import Sequence

from . import QuantError


class UnknownGpuError(QuantError):
    """No peaks are known of a GPU.

    Attributes:
        gpu: Its name.
        known: Names of those that are known.
    """

    def __init__(self, gpu: str, known: Sequence[str]) -> None:
        self.gpu, self.known = gpu, tuple(known)
        super().__init__(
            f"The peaks of {gpu!r} are not known, so there is no bound for it. Known are "
            f"{', '.join(known)}. Choose the one of these that is nearest in 'GPU', or add yours "
            "to quant/roofline/gpus.yaml."
        )


class FormatNotInGpuError(QuantError):
    """A GPU has no tensor cores for a format of a model.

    Attributes:
        gpu: Its name.
        format: ``nvfp4`` or ``fp8``.
        usable: Formats that it has.
    """

    def __init__(self, gpu: str, format: str, usable: Sequence[str]) -> None:
        self.gpu, self.format, self.usable = gpu, format, tuple(usable)
        super().__init__(
            f"{gpu} has no tensor cores for {format.upper()}: it multiplies {', '.join(usable)}. "
            "Choose recipe 'fp8' or 'bf16', or another GPU."
        )
