"""Mending a training graph after ONNX Runtime has built its gradients, before it is run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ort_train.ortmodule.aten import ATEN_DOMAIN

#: Between the operators of one gradient node, each of which computes one of its outputs.
SEPARATOR = "|"


def _attribute(node: Any, name: str) -> Any:
    return next((a for a in node.attribute if a.name == name), None)


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
    """A node for each wanted output of a gradient that names several operators; where a single one
    computes all, names for those that aren't wanted.

    `graph` is an onnx.GraphProto, changed in place.

    Where an input needs no gradient (a frozen weight, the images), ONNX Runtime leaves the name of
    that output empty (`gradient_builder.cc`, GetExternalGradient), and its ATen kernel then fails
    with `invalid index -1`.
    """

    nodes = []
    for node in graph.node:
        operator = _attribute(node, "operator") if node.domain == ATEN_DOMAIN else None
        names = operator.s.decode().split(SEPARATOR) if operator is not None else []
        if len(names) < 2:
            if names:
                outputs = (o or f"{node.name}/unused_{i}" for i, o in enumerate(node.output))
                node.output[:] = list(outputs)
            nodes.append(node)
            continue
        for name, output in zip(names, node.output, strict=False):
            if output:
                part = type(node)()
                part.CopyFrom(node)
                part.name = f"{node.name}/{name}"
                part.output[:] = [output]
                _attribute(part, "operator").s = name.encode()
                nodes.append(part)
    del graph.node[:]
    graph.node.extend(nodes)
