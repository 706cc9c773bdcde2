"""Errors of quantization and export; each message says what, the limit, the next step."""

from __future__ import annotations

from collections.abc import Sequence

MAX_QUOTED = 600


def shortened(text: str) -> str:
    """Cut a text that quotes a file, which may hold names of megabytes, to what can be shown."""
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


class QuantError(Exception):
    """Root of every error that quantization and export raise on purpose."""


class UnknownCheckpointError(QuantError):
    """The file holds no FLUX transformer that this version can quantize.

    Attributes:
        name: File name of the checkpoint.
        reason: What was found instead.
        missing: FLUX tensors that the file lacks.
        next_step: What to do instead.
    """

    def __init__(
        self,
        name: str,
        reason: str,
        missing: Sequence[str] = (),
        next_step: str = "Choose a FLUX diffusion model in 'Quantize FLUX to FP4'.",
    ) -> None:
        self.name, self.reason, self.missing = name, shortened(reason), tuple(missing)
        self.next_step = next_step
        lacks = ""
        if missing:
            first = shortened(", ".join(f"'{tensor}'" for tensor in self.missing[:3]))
            lacks = f" It lacks {len(missing)} FLUX tensors (first: {first})."
        super().__init__(
            f"'{name}' is no FLUX transformer that can be quantized: {self.reason}.{lacks} "
            f"{next_step}"
        )


class DamagedCheckpointError(QuantError):
    """A FLUX checkpoint contradicts itself: a file, a tensor or a scale is missing or wrong.

    Attributes:
        name: File name of the checkpoint.
        reason: What is wrong, with the tensor's name.
        next_step: What to do about it.
    """

    def __init__(
        self,
        name: str,
        reason: str,
        next_step: str = "Get the file anew, or choose another one in 'Quantize FLUX to FP4'.",
    ) -> None:
        self.name, self.reason, self.next_step = name, shortened(reason), next_step
        super().__init__(f"'{name}' cannot be read: {self.reason}. {next_step}")


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
            f"Cannot quantize '{shortened(linear)}' to NVFP4: {shortened(found)}; {limit}. "
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


class StatisticsMissingError(QuantError):
    """Blocks are to be quantized again, but what calibration measured in them is gone.

    Attributes:
        name: Name of the quantized checkpoint.
        block: The first block without statistics.
    """

    def __init__(self, name: str, block: str) -> None:
        self.name, self.block = name, block
        super().__init__(
            f"'{name}' cannot be changed: the calibration statistics of '{block}' are no longer in "
            "the folder '.statistics' of models/flux_fp4. To collect them again, quantize the same "
            "checkpoint with the same samples in 'Quantize FLUX to FP4' under another name. Or "
            "choose lora 'runtime' in 'Load FLUX FP4 Engine', which needs none."
        )


class NoiseCheckpointError(QuantError):
    """A model decoded from NVFP4 predicts nothing: its weights were read in the wrong order.

    Attributes:
        name: Of the checkpoint.
        layout: As which it was read.
        velocity_sqnr_db: How well it predicts the velocity of the calibration samples.
    """

    def __init__(self, name: str, layout: str, velocity_sqnr_db: float) -> None:
        self.name, self.layout, self.velocity_sqnr_db = name, layout, velocity_sqnr_db
        super().__init__(
            f"'{name}' was read as {layout}, and such a model predicts your calibration pictures "
            f"at {velocity_sqnr_db:.1f} dB; above 0 dB is needed. Either the file orders its FP4 "
            "values in another way than it says, or the pictures are not encoded for this model. "
            "Choose the bf16 checkpoint, or encode the pictures with the model's own VAE."
        )


class FormatBudgetError(QuantError):
    """The budget of recipe ``auto`` cannot be kept.

    Attributes:
        found: What would be needed.
        limit: The budget.
    """

    def __init__(self, found: str, limit: str) -> None:
        self.found, self.limit = found, limit
        super().__init__(
            f"Recipe 'auto' cannot keep its budget: {found}; {limit}. "
            "Raise the size or lower the quality floor in 'Quantize FLUX to FP4'."
        )


class RecipeError(QuantError):
    """A recipe cannot be used.

    Attributes:
        name: Of the recipe or its file.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, shortened(reason)
        super().__init__(
            f"Recipe {name!r} cannot be used: {self.reason}. "
            "Correct the file or choose another recipe in 'Quantize FLUX to FP4'."
        )


class QuantizedCheckpointError(QuantError):
    """A file in the FP4 model folder is not a quantized checkpoint of this version.

    Attributes:
        name: File name.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, shortened(reason)
        super().__init__(
            f"'{name}' is not a usable FP4 checkpoint: {self.reason}. "
            "Make it again with 'Quantize FLUX to FP4'."
        )


class DiskFullError(QuantError):
    """The disk cannot hold the file to be written.

    Attributes:
        name: File that was being written.
        needed_bytes: Size of the whole file; 0 where it is not known.
        free_bytes: What the disk has left.
    """

    def __init__(self, name: str, needed_bytes: int, free_bytes: int) -> None:
        self.name, self.needed_bytes, self.free_bytes = name, needed_bytes, free_bytes
        needs = f"needs {needed_bytes / 2**20:,.1f} MiB, but" if needed_bytes else "does not fit:"
        super().__init__(
            f"'{name}' {needs} its disk has {free_bytes / 2**20:,.1f} MiB left. Nothing was "
            "changed; free some space and queue again."
        )


class FileWriteError(QuantError):
    """The system refused to write a file for another reason than a full disk.

    Attributes:
        name: The file.
        folder: Name of its folder.
        reason: What the system says.
    """

    def __init__(self, name: str, folder: str, reason: str) -> None:
        self.name, self.folder, self.reason = name, folder, reason
        super().__init__(
            f"'{name}' cannot be written into the folder '{folder}': {reason}. Check that ComfyUI "
            "may write there and that the disk is in order, then queue again; what is finished is "
            "kept."
        )


class FolderNotWritableError(QuantError):
    """No file can be made in the folder of a quantized checkpoint.

    Attributes:
        folder: Name of the folder.
        reason: What the system says.
    """

    def __init__(self, folder: str, reason: str) -> None:
        self.folder, self.reason = folder, reason
        super().__init__(
            f"The folder '{folder}' cannot be written to: {reason}. Nothing was changed; allow "
            "ComfyUI to write there, or add another 'flux_fp4' folder to extra_model_paths.yaml."
        )


class CheckpointBusyError(QuantError):
    """Another process is writing the same quantized checkpoint.

    Attributes:
        name: File that is being written.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"'{name}' is being written by another process right now. "
            "Wait until that is done and queue again, or enter another name."
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


class TransformerExportError(QuantError):
    """The whole transformer cannot be one ONNX file.

    Attributes:
        name: The checkpoint's name.
        linear: The Linear that is stored in a layout of ComfyUI's alone.
    """

    def __init__(self, name: str, linear: str) -> None:
        self.name, self.linear = name, linear
        super().__init__(
            f"'{name}' cannot be exported as one ONNX file: '{linear}' is stored in ComfyUI's "
            "NVFP4 layout, which ONNX cannot point into. Quantize it with modulation in bf16 or "
            "FP8; the ONNX files of its blocks are not concerned."
        )


class NativeCheckpointError(QuantError):
    """A quantized checkpoint has no equal in ComfyUI's own NVFP4 form.

    Attributes:
        name: The checkpoint's name.
        linear: The first Linear in the way.
        reason: What ComfyUI does not know about it, as the rest of a sentence.
    """

    def __init__(self, name: str, linear: str, reason: str) -> None:
        self.name, self.linear, self.reason = name, linear, reason
        super().__init__(
            f"'{name}' cannot be saved as a ComfyUI NVFP4 checkpoint: '{linear}' {reason}. "
            "Quantize it with the recipe 'nvfp4-max' or 'nvfp4-mse' in 'Quantize FLUX to FP4'."
        )


class NativeTargetError(QuantError):
    """The file to be written exists and belongs to somebody else.

    Attributes:
        name: File name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"'{name}' exists already and was not made by 'Save as ComfyUI NVFP4 Checkpoint'; it "
            "was left as it is. Enter another name."
        )
