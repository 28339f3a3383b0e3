"""Symbolic functions for operators that ORTModule's exporter lacks or gets wrong at opset 17.

Each is registered for one export only, after upstream's own (`_custom_op_symbolic_registry.py` of
onnxruntime-training 1.19.2), and taken back with it.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch

from ort_train.ortmodule.export import convolutions, shapes, stop_gradient, torch_nodes
from ort_train.ortmodule.export.attention import scaled_dot_product_attention
from ort_train.ortmodule.export.exporter import exporter_module, upstream_symbolic
from ort_train.ortmodule.export.nodes import (
    aten,
    constant,
    dtype_of,
    ints,
    is_none,
    onnx_type,
    rank_of,
    scalar,
    sizes_of,
    typed,
    unsupported,
)
from ort_train.ortmodule.passes.activations import gelu

_SOFTPLUS_THRESHOLD = 20  # e^-20 is less than fp32 tells from 20
_SYMBOLICS: dict[str, Callable[..., Any]] = {}


def register(opset: int, is_trained: bool = True) -> None:
    """Register all of them with the TorchScript exporter.

    Args:
        is_trained: whether the graph needs gradients: without, what ONNX Runtime can run and not
            differentiate is left to torch's own functions.
    """
    for name, function in _SYMBOLICS.items():
        if function is torch_nodes.symbolic and not is_trained:
            continue
        torch.onnx.register_custom_op_symbolic(name, function, opset)
    for name in list(torch_nodes.missing(opset)):
        torch.onnx.register_custom_op_symbolic(name, torch_nodes.symbolic, opset)


def _symbolic(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            _SYMBOLICS[f"aten::{name}" if "::" not in name else name] = function
        return function

    return keep


@_symbolic("detach")
def _detach(g: Any, input: Any) -> Any:
    if not dtype_of(input).is_floating_point:
        return input
    return typed(aten(g, stop_gradient.OPERATOR, input), input, sizes_of(input))


# --- Normalization


@_symbolic("layer_norm")
def _layer_norm(
    g: Any, input: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any, cudnn_enable: Any
) -> Any:
    """Upstream leaves an absent weight or bias out, which ONNX Runtime's gradient builder turns
    into `Duplicate definition of name (_grad)`; torch's own has one output, training needs three.
    """
    shape = constant(normalized_shape, "is", "normalized_shape")
    dtype = dtype_of(input)
    if is_none(weight):
        weight = g.op("Constant", value_t=torch.ones(shape, dtype=dtype))
    if is_none(bias):
        bias = g.op("Constant", value_t=torch.zeros(shape, dtype=dtype))
    output, _, _ = g.op(
        "LayerNormalization",
        input,
        weight,
        bias,
        epsilon_f=constant(eps, "f", "eps"),
        axis_i=-len(shape),
        outputs=3,
    )
    return output


@_symbolic("batch_norm")
def _batch_norm(
    g: Any,
    input: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: Any,
    momentum: Any,
    eps: Any,
    cudnn_enabled: Any,
) -> Any:
    """In single steps: in a training graph ONNX Runtime normalizes by the batch, in eval mode too
    (`bn_replacement.cc` turns every BatchNormalization into BatchNormInternal).
    """
    rank = rank_of(input, "batch_norm")
    per_channel = ints(g, 1, -1, *[1] * (rank - 2))
    if constant(training, "b", "training") or is_none(mean):
        axes = [axis for axis in range(rank) if axis != 1]
        centered = g.op("Sub", input, g.op("ReduceMean", input, axes_i=axes, keepdims_i=1))
        square = g.op("Mul", centered, centered)
        variance = g.op("ReduceMean", square, axes_i=axes, keepdims_i=1)
    else:
        centered = g.op("Sub", input, g.op("Reshape", mean, per_channel))
        variance = g.op("Reshape", variance, per_channel)
    epsilon = scalar(g, constant(eps, "f", "eps"), dtype_of(input))
    output = g.op("Div", centered, g.op("Sqrt", g.op("Add", variance, epsilon)))
    if not is_none(weight):
        output = g.op("Mul", output, g.op("Reshape", weight, per_channel))
    if not is_none(bias):
        output = g.op("Add", output, g.op("Reshape", bias, per_channel))
    return output


@_symbolic("rms_norm")
def _rms_norm(
    g: Any, input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> Any:
    dtype = dtype_of(input)
    axes = list(range(-len(constant(normalized_shape, "is", "normalized_shape")), 0))
    square = g.op("ReduceMean", g.op("Mul", input, input), axes_i=axes, keepdims_i=1)
    epsilon = torch.finfo(dtype).eps if is_none(eps) else constant(eps, "f", "eps")
    root = g.op("Sqrt", g.op("Add", square, scalar(g, epsilon, dtype)))
    output = g.op("Mul", input, g.op("Reciprocal", root))
    return output if is_none(weight) else g.op("Mul", output, weight)


# --- Arithmetic


@_symbolic("div")
def _div(g: Any, self: Any, other: Any, *rounding_mode: Any) -> Any:
    """Divided by a scalar: as a product, because ONNX Runtime fuses sums of such quotients into
    ScaledSum (`scaled_sum_fusion.cc`), which has no kernel on the CPU, and gives all their outputs
    one name.
    """
    is_quotient = all(map(is_none, rounding_mode)) and dtype_of(self).is_floating_point
    if is_quotient and sizes_of(other) == [] and sizes_of(self) != []:
        divisor = g.op("Cast", other, to_i=onnx_type(dtype_of(self)))
        return g.op("Mul", self, g.op("Reciprocal", divisor))
    return exporter_module("symbolic_opset10").div(g, self, other, *rounding_mode)


@_symbolic("softplus")
def _softplus(g: Any, self: Any, beta: Any = 1, threshold: Any = 20) -> Any:
    """ONNX Runtime has no gradient of Softplus. Above 20, torch's threshold unless another is
    given, both forms are the identity."""
    dtype = dtype_of(self)
    factor = float(constant(beta, "f", "beta"))
    scaled = g.op("Mul", self, scalar(g, factor, dtype))
    tail = g.op("Exp", g.op("Neg", g.op("Abs", scaled)))
    log = g.op("Log", g.op("Add", tail, scalar(g, 1, dtype)))
    result = g.op("Add", g.op("Relu", scaled), log)
    if factor != 1:
        result = g.op("Mul", result, scalar(g, 1 / factor, dtype))
    limit = float(constant(threshold, "f", "threshold"))
    if limit >= _SOFTPLUS_THRESHOLD:
        return result
    is_above = g.op("Greater", scaled, scalar(g, limit, dtype))
    return g.op("Where", is_above, self, result)


@_symbolic("expm1")
def _expm1(g: Any, self: Any) -> Any:
    """tanh(x/2)·(eˣ + 1), which is as exact near 0 as elsewhere."""
    dtype = dtype_of(self)
    half = g.op("Tanh", g.op("Mul", self, scalar(g, 0.5, dtype)))
    return g.op("Mul", half, g.op("Add", g.op("Exp", self), scalar(g, 1, dtype)))


@_symbolic("matmul")
def _matmul(g: Any, self: Any, other: Any) -> Any:
    """Of vectors as of matrices: ONNX Runtime's gradient of MatMul is wrong for them."""
    first, second = rank_of(self, "matmul") == 1, rank_of(other, "matmul") == 1
    if first:
        self = g.op("Unsqueeze", self, ints(g, 0))
    if second:
        other = g.op("Unsqueeze", other, ints(g, 1))
    product = g.op("MatMul", self, other)
    axes = [axis for axis, is_vector in ((-2, first), (-1, second)) if is_vector]
    return g.op("Squeeze", product, ints(g, *axes)) if axes else product


@_symbolic("floor", "ceil", "round", "trunc", "sign")
def _step(g: Any, self: Any, *decimals: Any) -> Any:
    """Functions without a gradient, which ONNX Runtime's gradient builder refuses to pass by."""
    short = g.original_node.kind().partition("::")[2]
    if any(constant(each, "i", "decimals") != 0 for each in decimals):
        return torch_nodes.symbolic(g, self, *decimals)
    stopped = _detach(g, self)
    if short == "trunc":
        floor = g.op("Floor", g.op("Abs", stopped))
        return g.op("Mul", g.op("Sign", stopped), floor)
    return g.op(short.capitalize(), stopped)


@_symbolic("remainder", "fmod")
def _remainder(g: Any, self: Any, other: Any) -> Any:
    """self - other·n, where n, a whole number, has no gradient."""
    if not dtype_of(self).is_floating_point:
        return exporter_module("symbolic_opset9").remainder(g, self, other)
    quotient = _detach(g, g.op("Div", self, other))
    is_truncated = g.original_node.kind() == "aten::fmod"
    whole = g.op("Floor", g.op("Abs", quotient) if is_truncated else quotient)
    if is_truncated:
        whole = g.op("Mul", g.op("Sign", quotient), whole)
    return g.op("Sub", self, g.op("Mul", other, whole))


@_symbolic("einsum")
def _einsum(g: Any, equation: Any, tensors: Any, path: Any = None) -> Any:
    """With "..." written out: upstream leaves such an equation to Einsum, which has no gradient."""
    text = constant(equation, "s", "equation").replace(" ", "")
    if "..." in text:
        inputs, _, output = text.partition("->")
        values = exporter_module("symbolic_helper")._unpack_list(tensors)
        ranks = [
            rank_of(value, "einsum") - len(labels.replace("...", ""))
            for labels, value in zip(inputs.split(","), values, strict=True)
            if "..." in labels
        ]
        if len(set(ranks)) != 1 or not output:
            raise unsupported("einsum", f"the equation {text!r}")
        free = [letter for letter in string.ascii_letters if letter not in text]
        text = text.replace("...", "".join(free[: ranks[0]]))
        equation = g.op("Constant", value_s=text)
    return upstream_symbolic("::einsum")(g, equation, tensors, path)


@_symbolic("bitwise_and", "__and_")
def _bitwise_and(g: Any, self: Any, other: Any) -> Any:
    """ONNX has it from opset 18 on; until then And for masks, and torch for integers."""
    dtypes = {dtype_of(self), dtype_of(other)}
    if len(dtypes) > 1:
        raise unsupported("bitwise_and", f"operands of {' and '.join(sorted(map(str, dtypes)))}")
    if dtypes == {torch.bool}:
        return g.op("And", self, other)
    return aten(g, "bitwise_and", self, other, overload="Tensor")


# --- Loss


@_symbolic("cross_entropy_loss")
def _cross_entropy_loss(
    g: Any,
    self: Any,
    target: Any,
    weight: Any,
    reduction: Any,
    ignore_index: Any,
    label_smoothing: Any = 0.0,
) -> Any:
    """The mean over no label is NaN; ONNX Runtime's kernel returns 0."""
    arguments = (self, target, weight, reduction, ignore_index, label_smoothing)
    is_smoothed = constant(label_smoothing, "f", "label_smoothing") != 0
    if is_smoothed or dtype_of(target).is_floating_point:
        return torch_nodes.symbolic(g, *arguments)
    loss = upstream_symbolic("::cross_entropy_loss")(g, *arguments)
    if constant(reduction, "i", "reduction") != 1:
        return loss
    counts = g.op("Not", g.op("Equal", target, ignore_index))
    num_counted = g.op("ReduceSum", g.op("Cast", counts, to_i=onnx_type(torch.int64)), keepdims_i=0)
    dtype = dtype_of(loss)
    is_empty = g.op("Equal", num_counted, scalar(g, 0, torch.int64))
    nothing = g.op("Where", is_empty, scalar(g, float("nan"), dtype), scalar(g, 0, dtype))
    return typed(g.op("Add", loss, nothing), loss, [])


# --- Convolution, shapes, activation, attention, experts, and what torch runs


for _table in (convolutions.SYMBOLICS, shapes.SYMBOLICS, torch_nodes.SYMBOLICS):
    for _name, _function in _table.items():
        _symbolic(_name)(_function)
_symbolic("gelu")(gelu)
_symbolic("scaled_dot_product_attention")(scaled_dot_product_attention)


@_symbolic("ort_train::grouped_linear")
def _grouped_linear(g: Any, input: Any, weight: Any, offsets: Any, is_transposed: Any) -> Any:
    output = aten(g, "ort_train::grouped_linear", input, weight, offsets, is_transposed)
    weight_sizes = sizes_of(weight)
    axis = 2 if constant(is_transposed, "b", "is_transposed") else 1
    return typed(output, input, [None, weight_sizes[axis] if weight_sizes else None])


@_symbolic("ort_train::split_groups")
def _split_groups(g: Any, input: Any, sizes: Any, num_groups: Any) -> Any:
    num_parts = constant(num_groups, "i", "num_groups")
    parts = g.op("Split", input, sizes, axis_i=0, outputs=num_parts)
    parts = parts if num_parts > 1 else [parts]
    width = (sizes_of(input) or [None, None])[1:]
    return g.op("prim::ListConstruct", *(typed(part, input, [None, *width]) for part in parts))


@_symbolic("histc")
def _histc(g: Any, self: Any, bins: Any, min: Any, max: Any) -> Any:
    """Counts the tokens of each expert."""
    output = aten(g, "histc", self, bins, min, max)
    return typed(output, self, [constant(bins, "i", "bins")])
