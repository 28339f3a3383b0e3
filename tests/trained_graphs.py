"""The training graphs of a wrapped module, for tests that look at what they are made of."""

from __future__ import annotations

from typing import Any

import torch

from ort_train.backends import ort_forward
from ort_train.forward import taken_over
from ort_train.ortmodule.kernels.aten import operator_name


def forward_of(module: torch.nn.Module) -> Any:
    """The OrtForward that runs its training calls."""
    stand_in = taken_over(module)
    assert stand_in is not None
    return ort_forward(stand_in)


def engines(module: torch.nn.Module) -> list[Any]:
    """Those that it has built, in order."""
    return list(forward_of(module).engines.values())


def manager_of(module: torch.nn.Module) -> Any:
    """Upstream's training manager; the module has one graph."""
    (engine,) = engines(module)
    return engine._training_manager


def graph_of(module: torch.nn.Module) -> Any:
    """onnx.GraphProto of forward and backward; the module has one graph."""
    return manager_of(module)._onnx_models.optimized_model.graph


def operators(module: torch.nn.Module) -> list[str]:
    """The graph's operators, in order, those that torch runs by their name."""
    return [operator_name(node) for node in graph_of(module).node]
