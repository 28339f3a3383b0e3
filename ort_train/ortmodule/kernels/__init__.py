"""What torch computes inside ONNX Runtime's graph, by `aten`; the memory and threads it takes."""
