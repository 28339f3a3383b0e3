"""Values that stay in bf16 from one product of a training graph to the next.

Products in bf16 (products.py) hand on fp32, which ONNX Runtime's CPU kernels want. Where all that
reads a result is products, it is handed on as it is: not widened, and not rounded again, for its
entries are bf16's already. What lies in between may move entries, which ONNX Runtime does in any
type, or be an elementwise operator that autocast computes in bf16 as well (activations, scales,
masks); torch runs those then, since ONNX Runtime's kernels have no bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ort_train.ortmodule.graph import GraphIndex, attribute, declare
from ort_train.ortmodule.kernels import attention_kernels, packed_attention
from ort_train.ortmodule.kernels.aten import (
    BF16_SUFFIX,
    aten_node,
    operator_name,
    rename_operator,
)
from ort_train.ortmodule.kernels.direct import direct
from ort_train.ortmodule.passes import activations, output_gradients

_MUL, _MASKED, _SUM_ROWS = "ort_train::mul", "ort_train::masked", "ort_train::sum_rows"


# --- What torch runs


@direct(_MUL)
def _mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of the first's type; a number is multiplied by in fp32, when it has no axis."""
    return a * (b.reshape(()) if b.numel() == 1 else b)


@direct(_MASKED)
def _masked(mask: torch.Tensor, value: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.view(torch.bool), value.reshape(()), input)


@direct(_SUM_ROWS)
def _sum_rows(input: torch.Tensor) -> torch.Tensor:
    """Over all axes but the last, added in fp32, rounded once as autocast's, returned in fp32."""
    return input.reshape(-1, input.shape[-1]).sum(0).float()


# --- The graph

#: Of a node.
_Test = Callable[[Any], bool]


class _Passing(NamedTuple):
    """How a node passes on what it reads.

    Attributes:
        data: positions of the inputs whose type the outputs have.
        operator: what torch runs in its place on bf16; None where ONNX Runtime moves entries.
        inputs: positions of the inputs that torch is given; None for all.
    """

    data: tuple[int, ...]
    operator: str | None = None
    inputs: tuple[int, ...] | None = None


_MOVES = ("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Split")
#: Gradients that torch runs: of the type of what they are given first.
_GRADIENTS = frozenset({*activations.GRADIENTS.values(), output_gradients.ADD})
#: What they read may be of either type, and their outputs are of one.
_ATTENTION_GRADIENTS = frozenset({*attention_kernels.GRADIENTS.values(), packed_attention.GRADIENT})


def _is_number(index: GraphIndex, name: str) -> bool:
    shape = index.shapes.get(name)
    return shape is not None and all(size == 1 for size in shape)


def _passing(index: GraphIndex, node: Any) -> _Passing | None:
    """How the node passes on bf16, or None where it can't."""
    kind = operator_name(node)
    if kind in _MOVES:
        return _Passing((0,))
    if kind == "Concat":
        return _Passing(tuple(range(len(node.input))))
    if kind in ("QuickGelu", "QuickGeluGrad") and attribute(node, "alpha", 1.702) != 1.0:
        return None
    if kind == "QuickGeluGrad":
        return _Passing((0, 1), activations.SILU_GRAD)
    if kind in activations.FORWARD:
        return _Passing((0,), activations.FORWARD[kind])
    if kind in _GRADIENTS:
        return _Passing((0,), kind)
    if kind == "Where" and _is_number(index, node.input[1]):
        return _Passing((2,), _MASKED)
    if kind == "Mul":
        return _multiplying(index, node)
    return None


def _multiplying(index: GraphIndex, node: Any) -> _Passing | None:
    a, b = node.input
    for data, number in ((0, 1), (1, 0)):
        if _is_number(index, node.input[number]) and not _is_number(index, node.input[data]):
            return _Passing((data,), _MUL, (data, number))
    shape = index.shapes.get(a)
    if shape is None or shape != index.shapes.get(b) or 0 in shape:
        return None
    return _Passing((0, 1), _MUL)


def _takes(index: GraphIndex, node: Any) -> bool:
    """Whether a node that doesn't pass it on reads a value in bf16 as well."""
    kind = operator_name(node)
    is_gradient = kind in _GRADIENTS or kind in _ATTENTION_GRADIENTS
    return is_gradient or kind == "Shape" or _sums_rows(index, node)


def _sums_rows(index: GraphIndex, node: Any) -> bool:
    """Whether it is the sum over all axes but the last: a bias's gradient."""
    if node.op_type != "ReduceSum" or len(node.input) < 2 or attribute(node, "keepdims", 1):
        return False
    shape, axes = index.shapes.get(node.input[0]), index.initializers.get(node.input[1])
    if shape is None or len(shape) < 2 or axes is None:
        return False
    from onnx import numpy_helper

    return sorted(numpy_helper.to_array(axes).tolist()) == list(range(len(shape) - 1))


class _Groups:
    """Values that have one type, because nodes pass them on."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The name that stands for a value's group."""
        path = []
        while (parent := self._parents.get(name, name)) != name:
            path.append(name)
            name = parent
        for passed in path:
            self._parents[passed] = name
        return name

    def join(self, names: Iterable[str]) -> None:
        first, *others = names
        for name in others:
            self._parents[self.of(name)] = self.of(first)


def keep(proto: Any, is_rounding: _Test, can_hand_on: _Test) -> int:
    """Leave in bf16 what is rounded to it, and read by nothing that needs fp32.

    Args:
        proto: onnx.GraphProto of forward and backward, changed in place.
        is_rounding: of a node, whether it rounds to bf16.
        can_hand_on: whether it computes what can be had in bf16, by the operator whose name has
            BF16_SUFFIX at its end.

    Returns:
        how many roundings are left out
    """
    index = GraphIndex(proto)
    groups = _Groups()
    for node in proto.node:
        passing = _passing(index, node)
        if passing is not None:
            groups.join([*(node.input[i] for i in passing.data), *node.output])
        elif operator_name(node) in _ATTENTION_GRADIENTS:
            groups.join(node.output)
    wanted = {groups.of(node.input[0]) for node in proto.node if is_rounding(node)}
    for name in {*index.producers, *index.reads}:
        is_wanted = groups.of(name) in wanted
        if is_wanted and not _can_be_bf16(index, name, is_rounding, can_hand_on):
            wanted.remove(groups.of(name))
    kept = {name for name in index.producers if groups.of(name) in wanted}
    return _set(index, kept, is_rounding, can_hand_on)


def _can_be_bf16(index: GraphIndex, name: str, is_rounding: _Test, can_hand_on: _Test) -> bool:
    producer = index.producers.get(name)
    if producer is None or name in index.outputs:
        return False
    if _passing(index, producer) is None and not can_hand_on(producer):
        return False
    for node, position in index.reads.get(name, ()):
        passing = _passing(index, node)
        is_passed = passing is not None and position in passing.data
        if not (is_passed or is_rounding(node) or _takes(index, node)):
            return False
    return True


def _set(index: GraphIndex, kept: set[str], is_rounding: _Test, can_hand_on: _Test) -> int:
    """Write the graph with these values in bf16; returns how many roundings that spares."""
    from onnx import TensorProto

    nodes, renamed = [], {}
    summed: list[str] = []
    for node in index.graph.node:
        if is_rounding(node) and node.input[0] in kept:
            renamed[node.output[0]] = node.input[0]
            continue
        passing = _passing(index, node)
        if passing is not None and node.output[0] in kept:
            node = _passed_on(node, passing)
        elif can_hand_on(node) and node.output[0] in kept:
            rename_operator(node, operator_name(node) + BF16_SUFFIX)
        elif node.op_type == "ReduceSum" and node.input[0] in kept:
            node = aten_node(_SUM_ROWS, node.input[:1], node.output, node.name)
            summed.append(node.output[0])
        nodes.append(node)
    for node in nodes:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
    for name in kept:
        if name in index.infos:
            index.infos[name].type.tensor_type.elem_type = TensorProto.BFLOAT16
    declare(index.graph, sorted(kept), TensorProto.BFLOAT16)
    declare(index.graph, summed)
    del index.graph.node[:]
    index.graph.node.extend(nodes)
    return len(renamed)


def _passed_on(node: Any, passing: _Passing) -> Any:
    """The node for bf16."""
    if passing.operator is None:
        return node
    positions = range(len(node.input)) if passing.inputs is None else passing.inputs
    inputs = [node.input[i] for i in positions]
    return aten_node(passing.operator, inputs, node.output, node.name)
