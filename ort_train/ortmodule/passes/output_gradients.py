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

from ort_train.ortmodule.graph import GraphIndex, declare
from ort_train.ortmodule.kernels import memory
from ort_train.ortmodule.kernels.aten import ATEN_DOMAIN, aten_node, operator_name
from ort_train.ortmodule.kernels.direct import direct

ADD = "ort_train::sum_of_gradients"


@direct(ADD)
def _add(first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
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


def replace(graph: Any) -> None:
    """Give the sums with gradients that torch has made to torch, which can leave them out.

    Args:
        graph: onnx.GraphProto of forward and backward, changed in place.
    """
    index = GraphIndex(graph)
    given: set[str] = set()
    for node in graph.node:
        if node.op_type == "YieldOp":
            given = {name for output in node.output for name in _aliases(output, index)}
    sums = [node for node in graph.node if node.op_type == "Sum"]
    added: dict[str, Any] = {}  # by the gradient that each follows
    left_out = []
    for node in sums:
        first, *others = sorted(node.input, key=given.__contains__)
        path = _path_from_torch(first, index)
        if not path or not given.issuperset(others):
            continue
        # Right behind torch's node: a reshaped tensor of ONNX Runtime's doesn't own its memory.
        made, *moves = path
        name = made.output[0]
        total = f"{name}/added" if moves else node.output[0]
        if moves:
            moves[0].input[0] = total
            moves[-1].output[0] = node.output[0]
        added[name] = aten_node(ADD, [name, *others], [total], node.name)
        left_out.append(node)
    declare(graph, (node.output[0] for node in added.values()))
    nodes = []
    for node in graph.node:
        if node not in left_out:
            nodes.append(node)
        nodes.extend(added[name] for name in node.output if name in added)
    del graph.node[:]
    graph.node.extend(nodes)


def _path_from_torch(name: str, index: GraphIndex) -> list[Any]:
    """The node of torch's that made a value, and those that moved it since; all have one reader.

    Empty where ONNX Runtime made it: that memory it may give to another value once it is read.
    """
    path: list[Any] = []
    while (node := index.producers.get(name)) is not None and index.num_reads(name) == 1:
        path.insert(0, node)
        if node.domain == ATEN_DOMAIN:
            return path if len(node.output) == 1 else []
        if node.op_type not in ("Identity", "Reshape"):
            return []
        name = node.input[0]
    return []


def accept_scalars(manager: Any) -> None:
    """Let a single zero stand for missing gradients, where the graph adds them to others.

    A gradient that is given is added as before.

    Args:
        manager: ORTModule's TrainingManager, whose gradient graph is built and whose session isn't.
    """
    graph = manager._onnx_models.optimized_model.graph
    (yields,) = (node for node in graph.node if node.op_type == "YieldOp")
    (full,) = (a for a in yields.attribute if a.name == "full_shape_outputs")
    index = GraphIndex(graph)
    # Outputs that nothing trained leads to have a position, and no gradient.
    without = set(manager._graph_info.output_grad_indices_non_differentiable)
    positions = [i for i in range(len(yields.input)) if i not in without]
    gradients = dict(zip(positions, yields.output, strict=True))
    from_outside: set[str] = set(yields.output)
    scalar, shapeless = [], set()
    for position in filter(gradients.__contains__, full.ints):
        names = _aliases(gradients[position], index)
        from_outside |= names
        sums = [
            node for name in names for node in index.consumers(name) if node.op_type != "Identity"
        ]
        others = [[n for n in node.input if n not in from_outside] for node in sums]
        if sums and all(operator_name(n) in ("Sum", ADD) for n in sums) and all(others):
            scalar.append(position)
            shapeless |= names
            for node, first in zip(sums, others, strict=True):
                # What is first gives its memory to the result.
                last = [n for n in node.input if n not in first]
                node.input[:] = [*first, *last]
    kept = [position for position in full.ints if position not in scalar]
    full.ints[:] = kept
    for info in graph.value_info:
        if info.name in shapeless:
            info.type.tensor_type.ClearField("shape")
    manager._graph_info.output_grad_indices_require_full_shape = kept


def _aliases(name: str, index: GraphIndex) -> set[str]:
    """The name, and those of its copies by Identity."""
    names = {name}
    for node in index.consumers(name):
        if node.op_type == "Identity":
            names |= _aliases(node.output[0], index)
    return names
