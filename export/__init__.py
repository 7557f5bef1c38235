"""From an adapter to an engine: merge, ONNX, TensorRT, verification, manifest."""
