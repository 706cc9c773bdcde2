"""Errors about what is made of a quantized checkpoint: ONNX, or ComfyUI's own form."""

from __future__ import annotations

from . import QuantError


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
            "NVFP4 layout, which ONNX cannot point into. Choose 'bf16' or 'fp8' as 'modulation' in "
            "'Quantize FLUX to FP4'; the ONNX files of its blocks are not concerned."
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
