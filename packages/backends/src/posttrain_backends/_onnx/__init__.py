"""Everything that imports ONNX or ONNX Runtime; nothing outside `load` and `start` imports this package."""
