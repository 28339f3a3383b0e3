"""What is done to every finished training graph, in order, before it is run.

products.py comes after these, where oneDNN multiplies.
"""

from __future__ import annotations

import functools
import importlib

from ort_train.ortmodule import activations, graph, losses, output_gradients


@functools.cache
def register() -> None:
    """Have ORTModule apply them by its own hook, for the life of the process."""
    registry = importlib.import_module("onnxruntime.training.ortmodule.graph_optimizer_registry")
    registry.register_graph_optimizer()(graph.split_gradients)
    for replace in (losses.replace, activations.replace, output_gradients.replace):
        registry.register_graph_optimizer(devices="cpu", priority=-1)(replace)
