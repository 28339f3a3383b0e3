"""Gradients of a graph's outputs that the backward pass is given none for.

A language model returns its loss and its logits, and is trained by its loss. Upstream then adds
zeros of the logits' size to their gradient: with a large vocabulary two of the largest tensors of a
step. A single zero does the same.

ONNX Runtime's sum then takes the memory of its first operand, but not of what torch has computed
(`allocation_planner.cc`: outputs of such nodes are never reused), as the gradient of the cross
entropy is. That sum is torch's, too, and returns its first operand where all others are zero.
"""

from __future__ import annotations

from typing import Any

import torch

from ort_train.ortmodule import memory
from ort_train.ortmodule.aten import ATEN_DOMAIN, aten_node, direct

_SUM = "ort_train::sum_of_gradients"


@direct(_SUM)
def _sum(first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Gradients of one size, or a scalar zero for one that isn't given; in the first one's shape.

    The result may be the first one itself. It must have memory of its own, which what a node of
    torch returns has: ONNX Runtime writes nothing else to it.
    """
    result = first
    for other in others:
        if other.dim() or other != 0:
            total = memory.empty(*first.shape, dtype=first.dtype)
            other = other.view(first.shape) if other.dim() else other
            result = torch.add(result, other, out=total)
    return result


def accept_scalars(manager: Any, is_on_cpu: bool) -> None:
    """Let a single zero stand for missing gradients, where the graph adds them to others.

    A gradient that is given is added as before.

    Args:
        manager: ORTModule's TrainingManager, whose gradient graph is built and whose session isn't.
        is_on_cpu: whether it will run there; elsewhere to look at a zero would wait for the device.
    """
    graph = manager._onnx_models.optimized_model.graph
    (yields,) = (node for node in graph.node if node.op_type == "YieldOp")
    (full,) = (a for a in yields.attribute if a.name == "full_shape_outputs")
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    from_outside: set[str] = set(yields.output)
    scalar, shapeless = [], set()
    all_sums: list[Any] = []
    for index in full.ints:
        names = _aliases(yields.output[index], users)
        from_outside |= names
        sums = [
            node for name in names for node in users.get(name, ()) if node.op_type != "Identity"
        ]
        others = [[n for n in node.input if n not in from_outside] for node in sums]
        if sums and all(node.op_type == "Sum" for node in sums) and all(others):
            scalar.append(index)
            shapeless |= names
            for node, first in zip(sums, others, strict=True):
                # What is first gives its memory to the result.
                last = [n for n in node.input if n not in first]
                node.input[:] = [*first, *last]
            all_sums += sums
    kept = [index for index in full.ints if index not in scalar]
    full.ints[:] = kept
    for info in graph.value_info:
        if info.name in shapeless:
            info.type.tensor_type.ClearField("shape")
    manager._graph_info.output_grad_indices_require_full_shape = kept
    if is_on_cpu:
        _give_to_torch(graph, all_sums, users)


def _give_to_torch(graph: Any, sums: list[Any], users: dict[str, list[Any]]) -> None:
    """Have torch compute those sums whose first operand it has computed.

    That is reshaped in between, as a rule, and then the sum is instead: ONNX Runtime's reshaped
    tensor doesn't hold its memory, and so can't be the result.
    """
    producers = {name: node for node in graph.node for name in node.output}
    infos = {info.name: info for info in graph.value_info}
    instead: dict[str, list[Any]] = {}  # by what the replaced node returned
    for node in sums:
        first, *others = node.input
        result = node.output[0]
        source, reshape = producers[first], None
        if source.op_type == "Reshape" and len(users[first]) == 1:
            source, reshape = producers.get(source.input[0]), source
        if source is None or source.domain != ATEN_DOMAIN:
            continue
        if reshape is None:
            instead[result] = [aten_node(_SUM, node.input, [result], node.name)]
            continue
        flat, total = reshape.input[0], f"{result}/flat"
        reshaping = type(reshape)()
        reshaping.CopyFrom(reshape)
        reshaping.input[0], reshaping.output[0] = total, result
        instead[result] = [aten_node(_SUM, [flat, *others], [total], node.name), reshaping]
        instead[first] = []
        info = graph.value_info.add()
        info.CopyFrom(infos[flat])
        info.name = total
    nodes = [each for node in graph.node for each in instead.get(node.output[0], [node])]
    del graph.node[:]
    graph.node.extend(nodes)


def _aliases(name: str, users: dict[str, list[Any]]) -> set[str]:
    """The name, and those of its copies by Identity."""
    names = {name}
    for node in users.get(name, ()):
        if node.op_type == "Identity":
            names |= _aliases(node.output[0], users)
    return names
