"""GELU with tanh as one node, gradients of GELU and ReLU that torch computes, and what it computes
where values stay in bf16 (bf16_values.py).

ONNX Runtime's own kernels of these gradients (`activations_grad.cc`) run on one thread. There
torch's take a ninth of their time for GELU with tanh, which GPT-2 has (1.4 of 13.4 ms for 786k
entries), a third for GELU with erf, and a quarter for ReLU in T5's step. ONNX Runtime's forward
kernels, and its gradients of other activations, are as fast as torch's.
"""

from __future__ import annotations

from typing import Any

import torch

from ort_train.ortmodule.export.exporter import exporter_module
from ort_train.ortmodule.export.nodes import constant, sizes_of, typed
from ort_train.ortmodule.graph import declare
from ort_train.ortmodule.kernels.aten import aten_node
from ort_train.ortmodule.kernels.direct import direct

# --- The export


def gelu(g: Any, self: Any, approximate: Any) -> Any:
    """Symbolic function. torch's own writes the form with tanh as eight nodes, in an order in which
    ONNX Runtime's fusion (`fast_gelu_fusion.cc`) doesn't find it."""
    if constant(approximate, "s", "approximate") != "tanh":
        return exporter_module("symbolic_opset9").gelu(g, self, approximate)
    return typed(g.op("com.microsoft::FastGelu", self), self, sizes_of(self))


# --- What torch runs

GELU_GRAD, GELU_TANH_GRAD = "ort_train::gelu_grad", "ort_train::gelu_tanh_grad"
_GELU, _GELU_TANH = "ort_train::gelu", "ort_train::gelu_tanh"
_RELU, _RELU_GRAD = "ort_train::relu", "ort_train::relu_grad"
_SILU, SILU_GRAD = "ort_train::silu", "ort_train::silu_grad"


def _sum(input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return input if bias is None else input + bias


@direct(_GELU)
def _gelu(input: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.gelu(_sum(input, bias)).to(input.dtype)


@direct(GELU_GRAD)
def _gelu_grad(
    grad: torch.Tensor, input: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Of gelu(input + bias), with respect to its argument.

    In the gradient's type: either may have stayed in bf16 (bf16_values.py).
    """
    return torch.ops.aten.gelu_backward(grad, _sum(input, bias).to(grad.dtype))


@direct(_GELU_TANH)
def _gelu_tanh(input: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.gelu(_sum(input, bias), approximate="tanh").to(input.dtype)


@direct(GELU_TANH_GRAD)
def _gelu_tanh_grad(
    grad: torch.Tensor, input: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same of GELU's approximation by tanh."""
    argument = _sum(input, bias).to(grad.dtype)
    return torch.ops.aten.gelu_backward(grad, argument, approximate="tanh")


@direct(_RELU)
def _relu(input: torch.Tensor) -> torch.Tensor:
    return torch.relu(input)


@direct(_RELU_GRAD)
def _relu_grad(grad: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.threshold_backward(grad, output.to(grad.dtype), 0)


@direct(_SILU)
def _silu(input: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(input)


@direct(SILU_GRAD)
def _silu_grad(grad: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.silu_backward(grad, input)


# --- The graph

#: By ONNX Runtime's operators, which torch runs on bf16 alone. QuickGelu with alpha = 1 is SiLU.
FORWARD = {
    "Relu": _RELU,
    "Gelu": _GELU,
    "BiasGelu": _GELU,
    "FastGelu": _GELU_TANH,
    "QuickGelu": _SILU,
}
#: By ONNX Runtime's operators, which torch runs always.
GRADIENTS = {
    "ReluGrad": _RELU_GRAD,
    "GeluGrad": GELU_GRAD,
    "BiasGeluGrad_dX": GELU_GRAD,
    "FastGeluGrad": GELU_TANH_GRAD,
    "BiasFastGeluGrad_dX": GELU_TANH_GRAD,
}


def replace(graph: Any) -> None:
    """Give the graph's gradients of GELU and ReLU to torch.

    Args:
        graph: onnx.GraphProto of forward and backward, changed in place.
    """
    written: list[str] = []
    for index, node in enumerate(graph.node):
        if node.op_type not in GRADIENTS:
            continue
        operator = GRADIENTS[node.op_type]
        graph.node[index].CopyFrom(aten_node(operator, node.input, node.output, node.name))
        written.append(node.output[0])
    declare(graph, written)
