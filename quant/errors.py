"""Errors of quantization and export; each message says what, the limit, the next step."""

from __future__ import annotations

from collections.abc import Sequence


class QuantError(Exception):
    """Root of every error that quantization and export raise on purpose."""


class UnknownCheckpointError(QuantError):
    """The file holds no FLUX.1 transformer that this version can quantize.

    Attributes:
        name: File name of the checkpoint.
        reason: What was found instead.
        missing: FLUX tensors that the file lacks.
    """

    def __init__(self, name: str, reason: str, missing: Sequence[str] = ()) -> None:
        self.name, self.reason, self.missing = name, reason, tuple(missing)
        lacks = ""
        if missing:
            lacks = f" It lacks {len(missing)} FLUX tensors (first: '{missing[0]}')."
        super().__init__(
            f"'{name}' is not a FLUX.1 transformer in BFL or ComfyUI layout: {reason}.{lacks} "
            "Choose a FLUX.1 diffusion model in 'Quantize FLUX to FP4'."
        )


class UnsupportedWeightError(QuantError):
    """A weight has a dtype or a shape that NVFP4 cannot hold.

    Attributes:
        linear: Name of the Linear, for example ``double_blocks.0.img_attn.qkv``.
        found: The offending property with its value.
        limit: What is required.
    """

    def __init__(self, linear: str, found: str, limit: str) -> None:
        self.linear, self.found, self.limit = linear, found, limit
        super().__init__(
            f"Cannot quantize '{linear}' to NVFP4: {found}; {limit}. "
            "Choose a checkpoint with bf16, fp16 or fp32 weights of FLUX's own sizes."
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


class RecipeError(QuantError):
    """A recipe cannot be used.

    Attributes:
        name: Of the recipe or its file.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(
            f"Recipe '{name}' cannot be used: {reason}. "
            "Correct the file or choose another recipe in 'Quantize FLUX to FP4'."
        )


class QuantizedCheckpointError(QuantError):
    """A file in the FP4 model folder is not a quantized checkpoint of this version.

    Attributes:
        name: File name.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(
            f"'{name}' is not a usable FP4 checkpoint: {reason}. "
            "Make it again with 'Quantize FLUX to FP4'."
        )


class DiskFullError(QuantError):
    """The disk cannot hold the file to be written.

    Attributes:
        name: File that was being written.
        needed_bytes: Size of the whole file.
        free_bytes: What the disk has left.
    """

    def __init__(self, name: str, needed_bytes: int, free_bytes: int) -> None:
        self.name, self.needed_bytes, self.free_bytes = name, needed_bytes, free_bytes
        super().__init__(
            f"'{name}' needs {needed_bytes / 2**20:,.1f} MiB, but its disk has "
            f"{free_bytes / 2**20:,.1f} MiB left. Nothing was changed; free some space and queue "
            "again."
        )


class OnnxExportMissingError(QuantError):
    """The ONNX files of a quantized checkpoint are absent or belong to another one.

    Attributes:
        name: The checkpoint's name.
        reason: Which file is missing or stale.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(
            f"'{name}' has no up-to-date ONNX export: {reason}. "
            "Run 'Export FLUX FP4 to ONNX' first."
        )
