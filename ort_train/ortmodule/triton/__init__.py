"""Fusion of elementwise operators by ONNX Runtime's Triton generator."""
