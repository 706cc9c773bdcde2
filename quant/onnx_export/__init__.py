"""Quantized checkpoint to ONNX, one small file per block, no weight copied."""

from .export import export_blocks, exported_blocks, onnx_path

__all__ = ["export_blocks", "exported_blocks", "onnx_path"]
