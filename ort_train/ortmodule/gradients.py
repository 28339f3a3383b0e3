"""Gradients of operators that ONNX Runtime's gradient builder lacks."""

from __future__ import annotations


def register() -> None:
    """Register all of them with ONNX Runtime."""
