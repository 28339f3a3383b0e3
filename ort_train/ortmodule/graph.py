"""An onnx.GraphProto: what connects its nodes and is known of its values; what every finished
training graph needs before it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ort_train.ortmodule.kernels.aten import ATEN_DOMAIN, operator_name, rename_operator
from ort_train.ortmodule.kernels.torch_operators import is_gradient, narrowed

#: A size, or the name of one that differs between batches; 0 where not even that is known.
Dim = int | str
Shape = list[Dim]

#: Of onnx.TensorProto.DataType: FLOAT, FLOAT16, DOUBLE and BFLOAT16.
FLOATS = frozenset({1, 10, 11, 16})
#: Between the operators of one gradient node, each of which computes one of its outputs.
SEPARATOR = "|"


class GraphIndex:
    """Look-ups in a graph as it was when the index was made.

    Args:
        graph: onnx.GraphProto.

    Attributes:
        producers: the node that computes a value, by its name.
        reads: who reads a value: nodes and the positions of their inputs, in the graph's order;
            None is the position of what only a branch or a loop of theirs reads.
        outputs: names of the graph's outputs.
        initializers: onnx.TensorProto by name.
        infos: onnx.ValueInfoProto by name.
        types: onnx.TensorProto.DataType by name.
        shapes: of values and initializers whose rank is known, by name.
    """

    def __init__(self, graph: Any):
        self.graph = graph
        self.producers: dict[str, Any] = {}
        self.reads: dict[str, list[tuple[Any, int | None]]] = {}
        for node in graph.node:
            for name in filter(None, node.output):
                self.producers[name] = node
            for position, name in enumerate(node.input):
                if name:
                    self.reads.setdefault(name, []).append((node, position))
            for name in inputs_within(node):
                self.reads.setdefault(name, []).append((node, None))
        self.outputs = {info.name for info in graph.output}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.infos = {info.name: info for info in (*graph.value_info, *graph.input, *graph.output)}
        self.types: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {
            name: list(tensor.dims) for name, tensor in self.initializers.items()
        }
        for name, info in self.infos.items():
            kind = info.type.tensor_type
            self.types[name] = kind.elem_type
            if kind.HasField("shape"):
                self.shapes[name] = [d.dim_param or d.dim_value for d in kind.shape.dim]

    def consumers(self, name: str) -> list[Any]:
        """The nodes that read a value, each once."""
        return list({id(node): node for node, _ in self.reads.get(name, ())}.values())

    def num_reads(self, name: str) -> int:
        """How often nodes read a value; one may do so twice."""
        return len(self.reads.get(name, ()))

    def constant(self, name: str) -> Any:
        """The value of a Constant as an array, also behind nodes that only shape it; else None.

        Initializers aren't among them: those of an exported graph are parameters and buffers.
        """
        node = self.producers.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            return constant_value(node)
        if node.op_type not in ("Unsqueeze", "Squeeze", "Identity", "Cast", "Concat", "Reshape"):
            return None
        values = [self.constant(each) for each in node.input]
        if any(value is None for value in values):
            return None
        if node.op_type == "Concat":
            return np.concatenate([np.atleast_1d(value) for value in values])
        return np.asarray(values[0]).reshape(-1) if node.op_type != "Cast" else values[0]

    def ancestors(
        self, *names: str, passes: Callable[[Any, str], bool] = lambda node, name: True
    ) -> set[str]:
        """Everything that values are computed of, themselves included.

        Args:
            passes: of a node and a value that it reads, whether to go on there.
        """
        seen = set(names)
        stack = [*names]
        while stack:
            node = self.producers.get(stack.pop())
            for each in inputs_of(node) if node is not None else ():
                if each not in seen and passes(node, each):
                    seen.add(each)
                    stack.append(each)
        return seen


def inputs_of(node: Any) -> Iterator[str]:
    """What a node reads, and what is read in its branches and loops."""
    yield from filter(None, node.input)
    yield from inputs_within(node)


def inputs_within(node: Any) -> Iterator[str]:
    """What is read in a node's branches and loops."""
    for each in node.attribute:
        for part in each.g.node:
            yield from inputs_of(part)


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """A node's attribute as a Python value."""
    import onnx

    for each in node.attribute:
        if each.name == name:
            return onnx.helper.get_attribute_value(each)
    return default


def constant_value(node: Any) -> Any:
    """The value of a Constant node, an array."""
    import onnx

    value = onnx.helper.get_attribute_value(node.attribute[0])
    return onnx.numpy_helper.to_array(value) if hasattr(value, "dims") else np.asarray(value)


# --- Finished training graphs


def declare(graph: Any, names: Iterable[str], dtype: int = 1) -> None:
    """Say of what type values are, which can't be inferred of what torch runs.

    Args:
        graph: onnx.GraphProto, changed in place.
        names: of the values; what is said of one already stays.
        dtype: onnx.TensorProto.DataType, by default FLOAT.
    """
    from onnx import helper

    known = {info.name for info in (*graph.value_info, *graph.output)}
    for name in names:
        if name not in known:
            graph.value_info.append(helper.make_tensor_value_info(name, dtype, None))


def split_gradients(graph: Any) -> None:
    """A node for each wanted output of a gradient that names several operators. Where a single one
    computes all, names and a type for those that aren't wanted, unless it can leave them out.

    `graph` is an onnx.GraphProto, changed in place.

    Where an input needs no gradient (a frozen weight, the images), ONNX Runtime leaves the name of
    that output empty (`gradient_builder.cc`, GetExternalGradient), and its ATen kernel then fails
    with `invalid index -1`.
    """
    nodes = []
    unused: list[str] = []
    for node in graph.node:
        names = operator_name(node).split(SEPARATOR) if node.domain == ATEN_DOMAIN else []
        if len(names) < 2:
            if names and is_gradient(names[0]):
                wanted = [i for i, output in enumerate(node.output) if output]
                rename_operator(node, narrowed(names[0], wanted))
                node.output[:] = [node.output[i] for i in wanted]
            elif names:
                outputs = [o or f"{node.name}/unused_{i}" for i, o in enumerate(node.output)]
                unused += set(outputs) - {*node.output}
                node.output[:] = outputs
            nodes.append(node)
            continue
        for name, output in zip(names, node.output, strict=False):
            if output:
                part = type(node)()
                part.CopyFrom(node)
                part.name = f"{node.name}/{name}"
                part.output[:] = [output]
                rename_operator(part, name)
                nodes.append(part)
    declare(graph, sorted(unused))
    del graph.node[:]
    graph.node.extend(nodes)
