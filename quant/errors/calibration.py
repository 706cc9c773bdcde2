"""Errors about calibration samples and what was measured with them."""

from __future__ import annotations

from . import QuantError, shortened

OTHER_SAMPLES = "Connect other pictures or prompts to 'FLUX Calibration Samples'."
"""What to do about samples that overflow in the model."""


class CalibrationError(QuantError):
    """Calibration samples do not fit the model, or there are none.

    Attributes:
        found: What was given.
        limit: What the model takes.
    """

    def __init__(self, found: str, limit: str) -> None:
        self.found, self.limit = found, limit
        super().__init__(
            f"The calibration samples do not fit this model: {found}; {limit}. "
            "Connect conditioning and latents made for this model to 'FLUX Calibration Samples'."
        )


class CalibrationFileError(QuantError):
    """A file does not hold calibration samples of this version.

    Attributes:
        name: File name.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, shortened(reason)
        super().__init__(
            f"'{name}' holds no usable calibration samples: {self.reason}. "
            "Save them again in 'FLUX Calibration Samples'."
        )


class NotFiniteError(QuantError):
    """A tensor that a scale is computed from holds NaN or infinity.

    Attributes:
        subject: Which tensor.
        next_step: What the user can change.
    """

    def __init__(self, subject: str, next_step: str) -> None:
        self.subject, self.next_step = subject, next_step
        super().__init__(
            f"{subject} holds NaN or infinity; FP4 scales need finite values. {next_step}"
        )


class StatisticsMissingError(QuantError):
    """Blocks are to be quantized again, but what calibration measured in them is gone.

    Attributes:
        name: Name of the quantized checkpoint.
        block: The first block without statistics.
    """

    def __init__(self, name: str, block: str) -> None:
        self.name, self.block = name, block
        super().__init__(
            f"'{name}' cannot be changed: what calibration measured in '{block}' is gone from the "
            "folder '.statistics' of models/flux_fp4. Choose 'runtime' as 'lora' in 'Load FLUX FP4 "
            "Engine', which needs no statistics. Or collect them again: quantize the same "
            "checkpoint with the same samples in 'Quantize FLUX to FP4' under another name."
        )
