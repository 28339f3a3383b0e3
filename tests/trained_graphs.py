"""The training graph of a wrapped module, for tests that look at what it is made of."""

from __future__ import annotations

from typing import Any

import torch

from ort_train.forward import taken_over
from ort_train.ortmodule.aten import operator_name


def graph_of(module: torch.nn.Module) -> Any:
    """onnx.GraphProto of forward and backward; the module has one graph."""
    (engine,) = taken_over(module).runner._original.engines.values()
    return engine._training_manager._onnx_models.optimized_model.graph


def operators(module: torch.nn.Module) -> list[str]:
    """The graph's operators, in order, those that torch runs by their name."""
    return [operator_name(node) for node in graph_of(module).node]
