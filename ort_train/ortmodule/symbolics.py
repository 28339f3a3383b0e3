"""Symbolic functions for operators that ORTModule's exporter lacks at opset 17."""

from __future__ import annotations


def register(opset: int) -> None:
    """Register all of them with the TorchScript exporter."""
