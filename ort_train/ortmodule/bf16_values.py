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

from ort_train.ortmodule.aten import aten_node, direct, operator_name
from ort_train.ortmodule.graph import declare

#: Appended to the name of an operator that hands on bf16 in place of fp32.
SUFFIX = "_in_bf16"
_SUM_ROWS = "ort_train::sum_rows"


# --- What torch runs


@direct("ort_train::relu")
def _relu(input: torch.Tensor) -> torch.Tensor:
    return torch.relu(input)


@direct("ort_train::gelu")
def _gelu(input: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    argument = input if bias is None else input + bias
    return torch.nn.functional.gelu(argument).to(input.dtype)


@direct("ort_train::gelu_tanh")
def _gelu_tanh(input: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    argument = input if bias is None else input + bias
    return torch.nn.functional.gelu(argument, approximate="tanh").to(input.dtype)


@direct("ort_train::silu")
def _silu(input: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(input)


@direct("ort_train::silu_grad")
def _silu_grad(grad: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.silu_backward(grad, input)


@direct("ort_train::mul")
def _mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of the first's type; a number is multiplied by in fp32, when it has no axis."""
    return a * (b.reshape(()) if b.numel() == 1 else b)


@direct("ort_train::masked")
def _masked(mask: torch.Tensor, value: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.view(torch.bool), value.reshape(()), input)


@direct(_SUM_ROWS)
def _sum_rows(input: torch.Tensor) -> torch.Tensor:
    """Over all axes but the last, added in fp32, rounded once as autocast's, returned in fp32."""
    return input.reshape(-1, input.shape[-1]).sum(0).float()


# --- The graph


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
_UNARY = {
    "Relu": "ort_train::relu",
    "Gelu": "ort_train::gelu",
    "BiasGelu": "ort_train::gelu",
    "FastGelu": "ort_train::gelu_tanh",
    "QuickGelu": "ort_train::silu",
}
#: Gradients that torch runs (activations.py, output_gradients.py): of the type of what they are
#: given first.
_GRADIENTS = (
    "ort_train::relu_grad",
    "ort_train::gelu_grad",
    "ort_train::gelu_tanh_grad",
    "ort_train::sum_of_gradients",
)
#: What they read may be of either type, and their outputs are of one.
_ATTENTION_GRADIENTS = ("ort_train::attention_grad", "ort_train::masked_attention_grad")


class _Graph:
    def __init__(self, proto: Any, is_rounding: Callable[[Any], bool]):
        self.proto = proto
        self.is_rounding = is_rounding
        self.producers = {name: node for node in proto.node for name in node.output}
        self.readers: dict[str, list[tuple[Any, int]]] = {}
        for node in proto.node:
            for position, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, position))
        self.outputs = {info.name for info in proto.output}
        self.infos = {info.name: info for info in (*proto.value_info, *proto.input, *proto.output)}
        self.initializers = {tensor.name: tensor for tensor in proto.initializer}

    def sizes(self, name: str) -> list[int | str] | None:
        """What is known of a value's sizes: numbers, or names of those that batches decide."""
        if name in self.initializers:
            return list(self.initializers[name].dims)
        info = self.infos.get(name)
        if info is None or not info.type.tensor_type.HasField("shape"):
            return None
        return [d.dim_value or d.dim_param for d in info.type.tensor_type.shape.dim]

    def is_number(self, name: str) -> bool:
        sizes = self.sizes(name)
        return sizes is not None and all(size == 1 for size in sizes)

    def passing(self, node: Any) -> _Passing | None:
        """How the node passes on bf16, or None where it can't."""
        kind = operator_name(node)
        if kind in _MOVES:
            return _Passing((0,))
        if kind == "Concat":
            return _Passing(tuple(range(len(node.input))))
        if kind in ("QuickGelu", "QuickGeluGrad") and _float(node, "alpha", 1.702) != 1.0:
            return None
        if kind == "QuickGeluGrad":
            return _Passing((0, 1), "ort_train::silu_grad")
        if kind in _UNARY:
            return _Passing((0,), _UNARY[kind])
        if kind in _GRADIENTS:
            return _Passing((0,), kind)
        if kind == "Where" and self.is_number(node.input[1]):
            return _Passing((2,), "ort_train::masked")
        if kind == "Mul":
            return self._multiplying(node)
        return None

    def _multiplying(self, node: Any) -> _Passing | None:
        a, b = node.input
        for data, number in ((0, 1), (1, 0)):
            if self.is_number(node.input[number]) and not self.is_number(node.input[data]):
                return _Passing((data,), "ort_train::mul", (data, number))
        sizes = self.sizes(a)
        if sizes is None or sizes != self.sizes(b) or "" in sizes:
            return None
        return _Passing((0, 1), "ort_train::mul")

    def takes(self, node: Any) -> bool:
        """Whether a node that doesn't pass it on reads a value in bf16 as well."""
        if operator_name(node) in ("Shape", *_GRADIENTS, *_ATTENTION_GRADIENTS):
            return True
        return self.is_rounding(node) or self.sums_rows(node)

    def sums_rows(self, node: Any) -> bool:
        """Whether it is the sum over all axes but the last: a bias's gradient."""
        if node.op_type != "ReduceSum" or len(node.input) < 2 or _int(node, "keepdims", 1):
            return False
        sizes, axes = self.sizes(node.input[0]), self.initializers.get(node.input[1])
        if sizes is None or len(sizes) < 2 or axes is None:
            return False
        from onnx import numpy_helper

        return sorted(numpy_helper.to_array(axes).tolist()) == list(range(len(sizes) - 1))


def _float(node: Any, name: str, default: float) -> float:
    return next((float(a.f) for a in node.attribute if a.name == name), default)


def _int(node: Any, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


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


def keep(proto: Any, is_rounding: Callable[[Any], bool], can_hand_on: Callable[[Any], bool]) -> int:
    """Leave in bf16 what is rounded to it, and read by nothing that needs fp32.

    Args:
        proto: onnx.GraphProto of forward and backward, changed in place.
        is_rounding: of a node, whether it rounds to bf16.
        can_hand_on: whether it computes what can be had in bf16, by the operator whose name has
            SUFFIX at its end.

    Returns:
        how many roundings are left out
    """
    graph = _Graph(proto, is_rounding)
    groups = _Groups()
    for node in proto.node:
        passing = graph.passing(node)
        if passing is not None:
            groups.join([*(node.input[i] for i in passing.data), *node.output])
        elif operator_name(node) in _ATTENTION_GRADIENTS:
            groups.join(node.output)
    wanted = {groups.of(node.input[0]) for node in proto.node if is_rounding(node)}
    for name in {*graph.producers, *graph.readers}:
        if groups.of(name) in wanted and not _can_be_bf16(graph, name, can_hand_on):
            wanted.remove(groups.of(name))
    kept = {name for name in graph.producers if groups.of(name) in wanted}
    return _set(graph, kept, can_hand_on)


def _can_be_bf16(graph: _Graph, name: str, can_hand_on: Callable[[Any], bool]) -> bool:
    producer = graph.producers.get(name)
    if producer is None or name in graph.outputs:
        return False
    if graph.passing(producer) is None and not can_hand_on(producer):
        return False
    for node, position in graph.readers.get(name, ()):
        passing = graph.passing(node)
        is_passed = passing is not None and position in passing.data
        if not is_passed and not graph.takes(node):
            return False
    return True


def _set(graph: _Graph, kept: set[str], can_hand_on: Callable[[Any], bool]) -> int:
    """Write the graph with these values in bf16; returns how many roundings that spares."""
    from onnx import TensorProto

    nodes, renamed = [], {}
    summed: list[str] = []
    for node in graph.proto.node:
        if graph.is_rounding(node) and node.input[0] in kept:
            renamed[node.output[0]] = node.input[0]
            continue
        passing = graph.passing(node)
        if passing is not None and node.output[0] in kept:
            node = _passed_on(node, passing)
        elif can_hand_on(node) and node.output[0] in kept:
            (operator,) = (a for a in node.attribute if a.name == "operator")
            operator.s += SUFFIX.encode()
        elif node.op_type == "ReduceSum" and node.input[0] in kept:
            node = aten_node(_SUM_ROWS, node.input[:1], node.output, node.name)
            summed.append(node.output[0])
        nodes.append(node)
    for node in nodes:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
    for name in kept:
        if name in graph.infos:
            graph.infos[name].type.tensor_type.elem_type = TensorProto.BFLOAT16
    declare(graph.proto, kept, TensorProto.BFLOAT16)
    declare(graph.proto, summed)
    del graph.proto.node[:]
    graph.proto.node.extend(nodes)
    return len(renamed)


def _passed_on(node: Any, passing: _Passing) -> Any:
    """The node for bf16."""
    if passing.operator is None:
        return node
    positions = range(len(node.input)) if passing.inputs is None else passing.inputs
    inputs = [node.input[i] for i in positions]
    return aten_node(passing.operator, inputs, node.output, node.name)
