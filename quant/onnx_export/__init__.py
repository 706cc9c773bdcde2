"""Quantized checkpoint to ONNX: one small file per block or one for all, no weight copied."""

from .export import export_blocks, export_missing, exported_blocks, onnx_path
from .transformer import TRANSFORMER_NAME, export_transformer

__all__ = [
    "TRANSFORMER_NAME",
    "export_blocks",
    "export_missing",
    "export_transformer",
    "exported_blocks",
    "onnx_path",
]
