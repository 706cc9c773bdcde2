"""FLUX checkpoint to quantized checkpoint to ONNX; knows neither ComfyUI nor TensorRT."""
