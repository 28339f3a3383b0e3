"""Parts of a tensor of which a gradient reaches some, but not all.

ONNX Runtime's gradient of Split joins the gradients of its parts and leaves out those that have
none (`gradient_builder.cc`, GetSplitGradient; onnxruntime-training 1.19.2): the result is too
short, and where it broadcasts, silently wrong. Slices that together are all of a tensor become a
Split before that (`gather_fusion.cc`, GatherSliceToSplitFusion).

Here such a Split becomes slices, whose gradients are as long as what was sliced, and what no
gradient reaches is sliced of a copy that none passes (stop_gradient.py), so that they stay slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.export import stop_gradient
from ort_train.ortmodule.graph import FLOATS, GraphIndex, attribute

_PARTS = ("Split", "Slice", "Gather")


def apply(graph: Any) -> None:
    """Tell apart what a gradient reaches of a tensor's parts.

    Args:
        graph: onnx.GraphProto after :func:`stop_gradient.hide` and before
            :func:`stop_gradient.apply`, changed in place.

    Raises:
        UnsupportedModelError: naming a Split that doesn't say how long its parts are.
    """
    index = GraphIndex(graph)
    reached = _reached(index)
    mixed = {node.input[0] for node in graph.node if _is_mixed(node, index, reached)}
    stopped: set[str] = set()
    nodes: list[Any] = []
    for node in graph.node:
        whole = node.input[0] if node.input else ""
        if node.op_type not in _PARTS or whole not in mixed:
            nodes.append(node)
            continue
        if whole not in stopped:
            stopped.add(whole)
            nodes.append(stop_gradient.hidden(whole, _copy(whole)))
        parts = _sliced(node) if node.op_type == "Split" else [node]
        for part in parts:
            is_part = part.input and part.input[0] == whole
            if is_part and reached.isdisjoint(part.output):
                part.input[0] = _copy(whole)
            nodes.append(part)
    del graph.node[:]
    graph.node.extend(nodes)


def _copy(whole: str) -> str:
    return f"{whole}/untrained"


def _reached(index: GraphIndex) -> set[str]:
    """What a gradient of the outputs reaches, by way of numbers that can have one."""

    def passes(node: Any, name: str) -> bool:
        return index.types.get(name) in {*FLOATS, None} and not stop_gradient.is_hidden(node)

    return index.ancestors(*index.outputs, passes=passes)


def _is_mixed(node: Any, index: GraphIndex, reached: set[str]) -> bool:
    """Whether a gradient reaches some of the parts of what this node takes a part of."""
    if node.op_type not in _PARTS or node.input[0] not in reached:
        return False
    readers = index.reads[node.input[0]]
    takers = [each for each, at in readers if at == 0 and each.op_type in _PARTS]
    parts = [name for each in takers for name in each.output]
    return not reached.isdisjoint(parts) and not reached.issuperset(parts)


def _sliced(node: Any) -> Iterator[Any]:
    """The nodes in place of a Split."""
    from onnx import TensorProto, helper

    if len(node.input) < 2:
        raise UnsupportedModelError(
            f"Split {node.name!r} doesn't say how long its parts are, and not all of them are "
            "trained: ONNX Runtime has a wrong gradient for it; use slices in the model"
        )
    whole, sizes = node.input
    prefix = f"{node.output[0]}/slices"
    last, starts, ends, axes = (f"{prefix}/{n}" for n in ("last", "starts", "ends", "axes"))

    def constant(name: str, value: int, shape: list[int]) -> Any:
        tensor = helper.make_tensor(name, TensorProto.INT64, shape, [value])
        return helper.make_node("Constant", [], [name], value=tensor)

    yield constant(last, 0, [])
    yield constant(axes, attribute(node, "axis", 0), [1])
    yield helper.make_node("CumSum", [sizes, last], [ends], name=ends)
    yield helper.make_node("Sub", [ends, sizes], [starts], name=starts)
    for i, output in enumerate(node.output):
        number, start, end = (f"{name}/{i}" for name in (prefix, starts, ends))
        yield constant(number, i, [1])
        yield helper.make_node("Gather", [starts, number], [start], name=start)
        yield helper.make_node("Gather", [ends, number], [end], name=end)
        name = f"{prefix}/of_{i}"
        yield helper.make_node("Slice", [whole, start, end, axes], [output], name=name)
