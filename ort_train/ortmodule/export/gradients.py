"""Gradients of operators that ONNX Runtime's gradient builder lacks.

A registered gradient is a list of nodes in which `GO(i)` is the gradient of output i, `I(i)` is
the forward node's input and `GI(i)` the gradient of input i (`_custom_gradient_registry.py` of
onnxruntime-training 1.19.2). Each operator's gradient is registered as one node with an output per
input, which becomes one node per wanted gradient in the finished graph (graph.py).
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

from ort_train.ortmodule import graph
from ort_train.ortmodule.export import stop_gradient
from ort_train.ortmodule.kernels import attention_kernels, packed_attention
from ort_train.ortmodule.kernels.aten import ATEN_DOMAIN
from ort_train.ortmodule.passes import quantized


class _Gradient(NamedTuple):
    """How an operator that torch runs (aten.py) is differentiated.

    Attributes:
        backward: the operators that compute the gradients of the first inputs, one each; all
            take the output's gradient and then the forward's inputs `arguments`.
        arguments: positions of the forward's inputs.
        results: positions of the forward's outputs, which follow.
        masks: positions of the forward's inputs that follow those.
        num_outputs: of a single operator that computes several gradients.
    """

    backward: tuple[str, ...]
    arguments: tuple[int, ...]
    results: tuple[int, ...] = ()
    masks: tuple[int, ...] = ()
    num_outputs: int | None = None


_GRADIENTS = {
    "convolution": _Gradient(
        ("ort_train::convolution_input_grad", "ort_train::convolution_weight_grad"),
        (0, 1, 3, 4, 5, 6, 7, 8),  # without 2, the bias
    ),
    "ort_train::grouped_linear": _Gradient(
        ("ort_train::grouped_linear_input_grad", "ort_train::grouped_linear_weight_grad"),
        (0, 1, 2, 3),
    ),
    "ort_train::pack_rows": _Gradient(("ort_train::unpack_rows",), (1, 2)),
    "ort_train::unpack_rows": _Gradient(("ort_train::pack_rows",), (1, 2)),
    "ort_train::index_sum": _Gradient(("index_select",), (1, 2)),
    quantized.FORWARD: _Gradient((quantized.MARKER,), (1,)),
    **{
        name: _Gradient(
            (attention_kernels.GRADIENTS[name],),
            (0, 1, 2, 3, 4),
            results=(0, 1),
            masks=(5,) if has_mask else (),
            num_outputs=3,
        )
        for has_mask, name in attention_kernels.OPERATORS.items()
    },
    packed_attention.OPERATOR: _Gradient(
        (packed_attention.GRADIENT,), (0, 1, 2, 3, 4), results=(0, 1), masks=(5, 6), num_outputs=3
    ),
}
#: Inputs through which no gradient flows.
_STOPPED = {
    "ort_train::grouped_linear": {2},
    "ort_train::pack_rows": {1, 2},
    "ort_train::unpack_rows": {1, 2},
    "ort_train::rows_where": {0},
    "ort_train::kept_rows": {0, 1, 2},
    "ort_train::row_positions": {0, 1},
    "ort_train::unsliced_rows": {0, 1, 2, 3},
    "ort_train::index_sum": {2, 3},
    quantized.FORWARD: {1, 2, 7, 8, 9},  # all tensors but the input
    "histc": {0},
    stop_gradient.OPERATOR: {0},
    attention_kernels.OPERATORS[False]: {3, 4},
    attention_kernels.OPERATORS[True]: {3, 4, 5},
    attention_kernels.KIND: {0},
    packed_attention.OPERATOR: {3, 4, 5, 6},
    packed_attention.RUNS: {0, 1},
}


@functools.cache
def register() -> None:
    """Register all of them with ONNX Runtime, for the life of the process."""
    package = "onnxruntime.training.ortmodule"
    registry = importlib.import_module(f"{package}._custom_gradient_registry")
    native = importlib.import_module("onnxruntime.capi._pybind_state")
    for operator, gradient in _GRADIENTS.items():
        node = (
            ("ATen", ATEN_DOMAIN),
            [
                "GO(0)",
                *(f"I({i})" for i in gradient.arguments),
                *(f"O({i})" for i in gradient.results),
                *(f"I({i})" for i in gradient.masks),
            ],
            [f"GI({i})" for i in range(gradient.num_outputs or len(gradient.backward))],
            {"operator": {"value": graph.SEPARATOR.join(gradient.backward), "dtype": "string"}},
        )
        key = f"{ATEN_DOMAIN}::ATen::{operator}::"
        native.register_gradient_definition(key, registry._to_gradient_definition([node]))
    for operator, inputs in _STOPPED.items():
        key = f"{ATEN_DOMAIN}::ATen::{operator}::"
        native.register_custom_stop_gradient_edges(key, inputs)
