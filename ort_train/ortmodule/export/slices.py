"""Slices and entries of a last axis, left where the model has them.

ONNX Runtime's compute optimizer moves `l(x)[..., :3]` and `l(x)[..., 0]` in front of the linear
layer, and counts the weight's axes from the wrong end: `axis should be non-negative`
(`upstream_gather_actors.cc`, 1.19.2). It leaves slices of several axes alone, so a second axis is
named here, all of whose entries are kept, and an entry is taken as such a slice.
"""

from __future__ import annotations

from typing import Any

from ort_train.ortmodule.graph import GraphIndex, attribute, inputs_of

_END = 2**63 - 1


def apply(graph: Any) -> None:
    """Name a second axis in each slice of a last axis, also where it is for one entry.

    Args:
        graph: onnx.GraphProto before its gradient is built, changed in place.
    """
    index = GraphIndex(graph)
    nodes: list[Any] = []
    settings: set[str] = set()
    for node in graph.node:
        if node.op_type == "Slice" and _is_of_last_axis(node, index):
            nodes += _slice(node, *[index.constant(name) for name in node.input[1:]])
        elif node.op_type == "Gather" and (entry := _entry_of_last_axis(node, index)) is not None:
            nodes += _entry(node, *entry)
        else:
            nodes.append(node)
            continue
        settings.update(node.input[1:])
    # ONNX Runtime says on the terminal of each constant that nobody reads.
    unsure = index.ancestors(*settings)
    kept: list[Any] = []
    read = set(index.outputs)
    for node in reversed(nodes):
        if unsure.isdisjoint(node.output) or not read.isdisjoint(node.output):
            kept.append(node)
            read.update(inputs_of(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _is_of_last_axis(node: Any, index: GraphIndex) -> bool:
    rank = len(index.shapes.get(node.input[0], ()))
    settings = [index.constant(name) for name in node.input[1:]]
    if rank < 2 or len(settings) < 3 or any(each is None for each in settings):
        return False
    axes = settings[2].reshape(-1)
    return len(axes) == 1 and int(axes[0]) % rank == rank - 1


def _entry_of_last_axis(node: Any, index: GraphIndex) -> tuple[int, int] | None:
    """The axis and the index of one entry, where a node takes that of a last axis."""
    rank = len(index.shapes.get(node.input[0], ()))
    place = index.constant(node.input[1])
    axis = attribute(node, "axis", 0)
    if rank < 2 or place is None or place.ndim > 0 or axis % rank != rank - 1:
        return None
    return axis, int(place)


def _slice(node: Any, starts: Any, ends: Any, axes: Any, steps: Any = (1,)) -> list[Any]:
    """A slice that names the first axis, too, with its constants."""
    import numpy as np
    from onnx import helper, numpy_helper

    nodes = []
    names = []
    for what, given, of_first in (
        ("starts", starts, 0), ("ends", ends, _END), ("axes", axes, 0), ("steps", steps, 1),
    ):  # fmt: skip
        values = np.array([*np.reshape(given, -1), of_first], dtype=np.int64)
        name = f"{node.name}/{what}"
        value = numpy_helper.from_array(values)
        nodes.append(helper.make_node("Constant", [], [name], name, value=value))
        names.append(name)
    made = helper.make_node("Slice", [node.input[0], *names], node.output, node.name)
    return [*nodes, made]


def _entry(node: Any, axis: int, place: int) -> list[Any]:
    """One entry of an axis by a slice."""
    import numpy as np
    from onnx import helper, numpy_helper

    (output,) = node.output
    node.output[:] = [f"{output}/slice"]
    sliced = _slice(node, [place], [place + 1 if place != -1 else _END], [axis])
    axes = f"{node.name}/squeezed"
    value = numpy_helper.from_array(np.array([axis], dtype=np.int64))
    return [
        *sliced,
        helper.make_node("Constant", [], [axes], axes, value=value),
        helper.make_node("Squeeze", [f"{output}/slice", axes], [output], f"{node.name}/entry"),
    ]
