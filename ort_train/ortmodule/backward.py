"""Refusing a backward whose gradients would be wrong, or that can't run.

ORTModule's autograd function (`_training_manager.py`, onnxruntime-training 1.19.2) keeps what its
backward reads inside ONNX Runtime, where torch doesn't see it:

- A batch, a weight or an output that is written to between forward and backward changes the
  gradients. torch refuses that ("modified by an inplace operation"); upstream has it look at the
  last of the outputs only, and not at their reshaped kin.
- Under `create_graph` the gradients come back as constants, and their own gradients are missing
  from whatever they are added to.
- A second backward through one forward ends in an AttributeError, `retain_graph` or not.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from ort_train.errors import BackwardError
from ort_train.ortmodule.export.graph_module import MODULE_PREFIX
from ort_train.ortmodule.graph import GraphIndex, inputs_of

#: Operators whose result may lie in the memory of their first input.
_VIEWS = frozenset(("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"))
#: Those that read no values.
_SIZES = frozenset(("Shape", "Size"))
_version = operator.attrgetter("_version")


def check(manager: Any, unchecked: Any, name: str) -> None:
    """Have a TrainingManager refuse such a backward.

    Args:
        manager: ORTModule's, whose graph stands.
        unchecked: its autograd function.
        name: of the module, for messages.
    """
    graph = manager._onnx_models.optimized_model.graph
    inputs, outputs = _read_in_backward(graph)
    labels = [_label(graph.input[position].name) for position in inputs]
    labels += [f"output {position}" for position in outputs]

    class Checked(unchecked):
        @staticmethod
        def forward(ctx: Any, *tensors: torch.Tensor) -> Any:
            results = unchecked.forward(ctx, *tensors)
            read = [tensors[position] for position in inputs]
            # Detached: an output itself refers to this context.
            read += [results[position].detach() for position in outputs]
            ctx.read, ctx.versions = read, _versions(read)
            return results

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
            if ctx.read is None:
                raise BackwardError(
                    f"a second backward through one forward of {name}: ONNX Runtime gives back "
                    "what a forward keeps at the first, whatever retain_graph says. Add the "
                    "losses and call backward once, call the module again, or train with "
                    "backend='compile' or 'eager'"
                )
            if torch.is_grad_enabled():
                raise BackwardError(
                    f"create_graph=True asks for gradients of {name}'s gradients, which ONNX "
                    "Runtime doesn't compute: train with backend='eager'"
                )
            versions = _versions(ctx.read)
            if versions != ctx.versions:
                pairs = zip(labels, versions, ctx.versions, strict=True)
                changed = next(label for label, now, before in pairs if now != before)
                raise BackwardError(
                    f"{changed} of {name} was written to in place after a forward whose backward "
                    "reads it, so the gradients would be wrong: call backward first, or write to "
                    "a clone"
                )
            ctx.read = None
            return unchecked.backward(ctx, *gradients)

    manager._forward_class = Checked


def _versions(tensors: list[torch.Tensor]) -> list[int | None]:
    """How often each was written to in place."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:  # tensors of inference mode aren't counted
        return [None if each.is_inference() else each._version for each in tensors]


def _label(name: str) -> str:
    if name.startswith(MODULE_PREFIX):
        return f"weight {name.removeprefix(MODULE_PREFIX)!r}"
    return f"argument {name!r}"


def _read_in_backward(graph: Any) -> tuple[list[int], list[int]]:
    """Positions of the inputs and of the module's outputs whose values backward reads.

    Args:
        graph: onnx.GraphProto of forward and backward.
    """
    index = GraphIndex(graph)
    producers = index.producers
    (yields,) = (node for node in graph.node if node.op_type == "YieldOp")
    computed = index.ancestors(*inputs_of(yields))
    forward = {id(yields), *(id(producers[name]) for name in computed & producers.keys())}

    def origin(name: str) -> str:
        while (node := producers.get(name)) is not None and node.op_type in _VIEWS:
            name = node.input[0]
        return name

    read = {
        origin(name)
        for node in graph.node
        if id(node) not in forward and node.op_type not in _SIZES
        # A shape is the second input of one; the first is looked at where its result is read.
        for name in ([] if node.op_type in _VIEWS else inputs_of(node))
    }
    read |= {origin(info.name) for info in graph.output}
    inputs = [i for i, info in enumerate(graph.input) if info.name in read]
    outputs = [i for i, name in enumerate(yields.input) if origin(name) in read]
    return inputs, outputs
