"""What is done to every finished training graph, in order, before it is run."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from ort_train.ortmodule import graph
from ort_train.ortmodule.export import stop_gradient
from ort_train.ortmodule.passes import activations, losses, output_gradients, products, quantized

#: Devices, and what changes an onnx.GraphProto in place.
_PASSES: tuple[tuple[str, Callable[[Any], None]], ...] = (
    ("all", stop_gradient.replace),
    ("all", graph.split_gradients),
    ("all", quantized.decode_beside_products),
    ("cpu", losses.replace),
    ("cpu", activations.replace),
    ("cpu", output_gradients.replace),
    ("cpu", products.replace_where_wanted),  # it asks what the others have written
)


@functools.cache
def register() -> None:
    """Have ORTModule apply them by its own hook, after upstream's, for the life of the process."""
    registry = importlib.import_module("onnxruntime.training.ortmodule.graph_optimizer_registry")
    for devices, apply in _PASSES:
        registry.register_graph_optimizer(devices=devices, priority=-1)(apply)
