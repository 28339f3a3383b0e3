"""A decoder as an ONNX graph, fused or traced, and the gate of its parity: `export` makes it."""
