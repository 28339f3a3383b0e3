"""The cross entropy of a finished training graph, given to torch in place of ONNX Runtime's kernel.

ONNX Runtime's (`SoftmaxCrossEntropyLossInternal` and its gradient) runs on one thread.
"""

from __future__ import annotations

from typing import Any

import torch

from ort_train.ortmodule import memory
from ort_train.ortmodule.aten import BF16_SUFFIX, aten_node, direct
from ort_train.ortmodule.graph import GraphIndex, attribute

_FORWARD = "SoftmaxCrossEntropyLossInternal"
_BACKWARD = "SoftmaxCrossEntropyLossInternalGrad"
_REDUCTIONS = {b"mean": 1, b"sum": 2}  # at::Reduction
#: Of a gradient in bf16, so many entries are computed in fp32 and rounded while the cache has them.
_ROUNDED_ENTRIES = 2**20


def _define(name: str, reduction: int) -> None:
    @direct(f"ort_train::cross_entropy_{name}")
    def forward(
        logits: torch.Tensor, labels: torch.Tensor, ignore_index: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, C) and (N,) to the loss and (N, C) logarithms of probabilities."""
        log_probs = memory.empty(*logits.shape, dtype=logits.dtype)
        torch.log_softmax(logits, -1, out=log_probs)
        ignored = -100 if ignore_index is None else int(ignore_index)
        loss, _ = torch.ops.aten.nll_loss_forward(log_probs, labels, None, reduction, ignored)
        return loss, log_probs

    def weights(
        grad: torch.Tensor, labels: torch.Tensor, ignore_index: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 1) labels, 0 for ignored ones, and (N, 1) factors of the rows' gradients."""
        is_kept = labels != (-100 if ignore_index is None else int(ignore_index))
        scale = grad.reshape(()) / (is_kept.sum() if name == "mean" else 1)
        return torch.where(is_kept, labels, 0)[:, None], torch.where(is_kept, scale, 0.0)[:, None]

    @direct(f"ort_train::cross_entropy_{name}_grad")
    def backward(
        grad: torch.Tensor,
        log_probs: torch.Tensor,
        labels: torch.Tensor,
        ignore_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Gradient with respect to the logits, (N, C).

        Written in one tensor of that size: torch's own two steps need another one.
        """
        result = memory.empty(*log_probs.shape, dtype=log_probs.dtype)
        return _write_gradient(result, log_probs, *weights(grad, labels, ignore_index))

    @direct(f"ort_train::cross_entropy_{name}_grad{BF16_SUFFIX}")
    def backward_in_bf16(
        grad: torch.Tensor,
        log_probs: torch.Tensor,
        labels: torch.Tensor,
        ignore_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same, rounded."""
        label, weight = weights(grad, labels, ignore_index)
        result = memory.empty(*log_probs.shape, dtype=torch.bfloat16)
        num_rows = max(1, _ROUNDED_ENTRIES // max(1, log_probs.shape[1]))
        exact = torch.empty_like(log_probs[:num_rows])
        for first in range(0, len(log_probs), num_rows):
            part = slice(first, first + num_rows)
            rows = exact[: len(label[part])]
            result[part] = _write_gradient(rows, log_probs[part], label[part], weight[part])
        return result


def _write_gradient(
    result: torch.Tensor, log_probs: torch.Tensor, label: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    torch.exp(log_probs, out=result)
    result.scatter_add_(1, label, result.new_full((1, 1), -1.0).expand(label.shape))
    return result.mul_(weight)


for _name, _reduction in _REDUCTIONS.items():
    _define(_name.decode(), _reduction)


def replace(graph: Any) -> None:
    """Give the graph's losses to torch.

    Args:
        graph: onnx.GraphProto of forward and backward, changed in place.
    """
    shapes = GraphIndex(graph).shapes
    taken: set[str] = set()  # names of the logarithms
    for index, node in enumerate(graph.node):
        reduction = attribute(node, "reduction", b"mean")
        if node.op_type == _FORWARD:
            scores, labels, weight, ignored = [*node.input, "", ""][:4]
            if len(shapes.get(scores, ())) != 2 or weight or reduction not in _REDUCTIONS:
                continue
            taken.add(node.output[1])
            suffix, inputs = "", [scores, labels, ignored]
        elif node.op_type == _BACKWARD and node.input[1] in taken and len(node.input) < 6:
            grad, log_probs, labels, _, ignored = [*node.input, "", ""][:5]
            suffix, inputs = "_grad", [grad, log_probs, labels, ignored]
        else:
            continue
        name = f"ort_train::cross_entropy_{reduction.decode()}{suffix}"
        inputs = inputs if inputs[-1] else inputs[:-1]
        graph.node[index].CopyFrom(aten_node(name, inputs, node.output, node.name))
