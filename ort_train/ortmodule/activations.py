"""GELU with tanh as one node, and gradients of GELU and ReLU that torch computes.

ONNX Runtime's own kernels of these gradients (`activations_grad.cc`) run on one thread. There
torch's take a ninth of their time for GELU with tanh, which GPT-2 has (1.4 of 13.4 ms for 786k
entries), a third for GELU with erf, and a quarter for ReLU in T5's step. ONNX Runtime's forward
kernels, and its gradients of other activations, are as fast as torch's.
"""

from __future__ import annotations

from typing import Any

import torch

from ort_train.ortmodule.aten import aten_node, direct
from ort_train.ortmodule.graph import declare
from ort_train.ortmodule.nodes import constant, sizes_of, typed
from ort_train.ortmodule.upstream import exporter_module

# --- The export


def gelu(g: Any, self: Any, approximate: Any) -> Any:
    """Symbolic function. torch's own writes the form with tanh as eight nodes, in an order in which
    ONNX Runtime's fusion (`fast_gelu_fusion.cc`) doesn't find it."""
    if constant(approximate, "s", "approximate") != "tanh":
        return exporter_module("symbolic_opset9").gelu(g, self, approximate)
    return typed(g.op("com.microsoft::FastGelu", self), self, sizes_of(self))


# --- What torch runs


def _argument(grad: torch.Tensor, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In the gradient's type: either may have stayed in bf16 (bf16_values.py)."""
    return (input if bias is None else input + bias).to(grad.dtype)


@direct("ort_train::gelu_grad")
def _gelu_grad(
    grad: torch.Tensor, input: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Of gelu(input + bias), with respect to its argument."""
    return torch.ops.aten.gelu_backward(grad, _argument(grad, input, bias))


@direct("ort_train::gelu_tanh_grad")
def _gelu_tanh_grad(
    grad: torch.Tensor, input: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same of GELU's approximation by tanh."""
    argument = _argument(grad, input, bias)
    return torch.ops.aten.gelu_backward(grad, argument, approximate="tanh")


@direct("ort_train::relu_grad")
def _relu_grad(grad: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.threshold_backward(grad, output.to(grad.dtype), 0)


# --- The graph

_OPERATORS = {
    "ReluGrad": "ort_train::relu_grad",
    "GeluGrad": "ort_train::gelu_grad",
    "BiasGeluGrad_dX": "ort_train::gelu_grad",
    "FastGeluGrad": "ort_train::gelu_tanh_grad",
    "BiasFastGeluGrad_dX": "ort_train::gelu_tanh_grad",
}


def replace(graph: Any) -> None:
    """Give the graph's gradients of GELU and ReLU to torch.

    Args:
        graph: onnx.GraphProto of forward and backward, changed in place.
    """
    written: list[str] = []
    for index, node in enumerate(graph.node):
        if node.op_type not in _OPERATORS:
            continue
        operator = _OPERATORS[node.op_type]
        graph.node[index].CopyFrom(aten_node(operator, node.input, node.output, node.name))
        written.append(node.output[0])
    declare(graph, written)
