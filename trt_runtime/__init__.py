"""Block ONNX to TensorRT plan to execution; knows neither ComfyUI nor ModelOpt."""
