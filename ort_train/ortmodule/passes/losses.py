"""The cross entropy of a finished training graph, given to torch in place of ONNX Runtime's kernel.

ONNX Runtime's (`SoftmaxCrossEntropyLossInternal` and its gradient) runs on one thread.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from ort_train.ortmodule.graph import GraphIndex, attribute
from ort_train.ortmodule.kernels import memory
from ort_train.ortmodule.kernels.aten import BF16_SUFFIX, aten_node
from ort_train.ortmodule.kernels.direct import direct

_FORWARD = "SoftmaxCrossEntropyLossInternal"
_BACKWARD = "SoftmaxCrossEntropyLossInternalGrad"
#: What torch runs in their place, by the reduction.
OPERATORS = {name: f"ort_train::cross_entropy_{name}" for name in ("mean", "sum")}
GRADIENTS = {reduction: f"{name}_grad" for reduction, name in OPERATORS.items()}
_nll_loss = torch.ops.aten.nll_loss_forward.default
#: So many entries are computed while the cache has them; more calls than that cost more.
_PART_ENTRIES = 2**20
_SUM = 2  # at::Reduction


def _ignored(ignore_index: torch.Tensor | None) -> int:
    return -100 if ignore_index is None else int(ignore_index)


def _parts(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows, at least once, and room for as many in fp32, which is used again."""
    num_rows = max(1, _PART_ENTRIES // max(1, logits.shape[1]))
    room = torch.empty_like(logits[:num_rows])
    for first in range(0, max(1, len(logits)), num_rows):
        part = slice(first, min(first + num_rows, len(logits)))
        yield part, room[: part.stop - first]


def _define(reduction: str) -> None:
    @direct(OPERATORS[reduction])
    def forward(
        logits: torch.Tensor, labels: torch.Tensor, ignore_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, C) and (N,) to the loss.

        Nothing of the logits' size is written: what the gradient needs it computes again, in less
        time than memory takes to give it.
        """
        sums, ignored = [], _ignored(ignore_index)
        for part, room in _parts(logits):
            torch.log_softmax(logits[part], -1, out=room)
            sums.append(_nll_loss(room, labels[part], None, _SUM, ignored))
        total, count = (torch.stack(each).sum() for each in zip(*sums, strict=True))
        return total / count if reduction == "mean" else total

    @direct(GRADIENTS[reduction])
    def backward(
        grad: torch.Tensor,
        logits: torch.Tensor,
        labels: torch.Tensor,
        ignore_index: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Gradient with respect to the logits, (N, C), of their type or rounded to another."""
        result = memory.empty(*logits.shape, dtype=dtype or logits.dtype)
        is_kept = labels != _ignored(ignore_index)
        label = torch.where(is_kept, labels, 0)[:, None]
        scale = grad.reshape(()) / (is_kept.sum() if reduction == "mean" else 1)
        weight = torch.where(is_kept, scale, 0.0)[:, None]
        is_rounded = result.dtype != logits.dtype
        for part, room in _parts(logits):
            rows = room if is_rounded else result[part]
            torch.softmax(logits[part], -1, out=rows)
            rows.scatter_add_(1, label[part], rows.new_full((1, 1), -1.0).expand(len(rows), 1))
            rows.mul_(weight[part])
            if is_rounded:
                result[part] = rows
        return result

    in_bf16 = functools.partial(backward, dtype=torch.bfloat16)
    direct(GRADIENTS[reduction] + BF16_SUFFIX)(in_bf16)


for _reduction in OPERATORS:
    _define(_reduction)


def replace(graph: Any) -> None:
    """Give the graph's losses to torch.

    Args:
        graph: onnx.GraphProto of forward and backward, changed in place.
    """
    index = GraphIndex(graph)
    logits_of: dict[str, str] = {}  # by the name of the logarithms of their probabilities
    for position, node in enumerate(graph.node):
        if node.op_type not in (_FORWARD, _BACKWARD):
            continue
        reduction = attribute(node, "reduction", b"mean").decode()
        if node.op_type == _FORWARD:
            logits, labels, weight, ignored = [*node.input, "", ""][:4]
            log_probs = node.output[1]
            readers = index.consumers(log_probs)
            is_free = log_probs not in index.outputs and all(map(_is_gradient, readers))
            is_plain = len(index.shapes.get(logits, ())) == 2 and not weight
            if not (is_free and is_plain and reduction in OPERATORS):
                continue
            logits_of[log_probs] = logits
            name, inputs = OPERATORS[reduction], [logits, labels, ignored]
        elif _is_gradient(node) and node.input[1] in logits_of:
            grad, log_probs, labels, _, ignored = [*node.input, "", ""][:5]
            name, inputs = GRADIENTS[reduction], [grad, logits_of[log_probs], labels, ignored]
        else:
            continue
        inputs = inputs if inputs[-1] else inputs[:-1]
        graph.node[position].CopyFrom(aten_node(name, inputs, node.output[:1], node.name))


def _is_gradient(node: Any) -> bool:
    return node.op_type == _BACKWARD and len(node.input) < 6
