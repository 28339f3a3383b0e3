"""What torch computes inside ONNX Runtime's graph, by `aten`, and the memory that it takes."""
