"""Gradients of a graph's outputs that the backward pass is given none for.

A language model returns its loss and its logits, and is trained by its loss. Upstream then adds
zeros of the logits' size to their gradient: with a large vocabulary two of the largest tensors of a
step. A single zero does the same, and the sum takes the memory of its first operand.
"""

from __future__ import annotations

from typing import Any


def accept_scalars(manager: Any) -> None:
    """Let a single zero stand for missing gradients, where the graph adds them to others.

    A gradient that is given is added as before.

    Args:
        manager: ORTModule's TrainingManager, whose gradient graph is built and whose session isn't.
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
    kept = [index for index in full.ints if index not in scalar]
    full.ints[:] = kept
    for info in graph.value_info:
        if info.name in shapeless:
            info.type.tensor_type.ClearField("shape")
    manager._graph_info.output_grad_indices_require_full_shape = kept


def _aliases(name: str, users: dict[str, list[Any]]) -> set[str]:
    """The name, and those of its copies by Identity."""
    names = {name}
    for node in users.get(name, ()):
        if node.op_type == "Identity":
            names |= _aliases(node.output[0], users)
    return names
