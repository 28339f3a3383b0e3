"""Leaving out what a batch doesn't need: tokens whose label is ignored, and padding.

Both change the exported graph before its gradient is built, for every batch: which rows are left
out is computed in the graph, so one graph serves all densities. Upstream's own (`compute optimizer`
of onnxruntime-training 1.19.2) look at the first batch only, never find the loss of a transformers
model, and have no kernel for padding on the CPU.

Labels: a cross entropy ignores rows whose label is `ignore_index`. It gets the other rows alone,
and so do the nodes before it, back to where the tokens of a sequence meet (the last layer's
attention) or where another output needs all rows.

Padding: nodes that compute each token by itself (embeddings, norms, projections, MLPs) run on the
tokens that `attention_mask` shows, and on those whose label counts. So does masked attention that
torch runs (packed_attention.py), each sample by itself. Other nodes get zeros where the padding
was; they may only be attention that masks it, or the model is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.graph import GraphIndex
from ort_train.ortmodule.sparse.ignored_labels import LOSS, WAY_OUT, leave_out_labels, trace_loss
from ort_train.ortmodule.sparse.padding import Padding
from ort_train.ortmodule.sparse.rewriting import Rewriter
from ort_train.ortmodule.sparse.rows import PRODUCTS


@dataclass(frozen=True)
class Savings:
    """What one token that is left out saves: its matrix products, forward and backward.

    Attributes:
        flops_per_padding: of a padding token.
        flops_per_ignored_label: of a token whose label is ignored.
    """

    flops_per_padding: int = 0
    flops_per_ignored_label: int = 0


def apply(graph: Any, labels: bool, padding: bool, trainable: frozenset[str]) -> Savings:
    """Change an exported graph, in place, with inferred shapes.

    Args:
        graph: onnx.GraphProto; its loss and its inputs keep their names.
        labels: leave out rows whose label is ignored.
        padding: leave out padding.
        trainable: names of the parameters that are trained, for the account of what is saved.

    Raises:
        UnsupportedModelError: where a part that was asked for can't be left out, with the reason.
    """
    label_flops = padding_flops = 0
    rewriter = Rewriter(graph)
    losses = [trace_loss(node, rewriter) for node in graph.node if node.op_type == LOSS]
    if labels:
        if not losses:
            raise UnsupportedModelError(
                "label_sparsity finds no cross entropy in the training forward: pass labels, so "
                f"that the model computes its loss, or {WAY_OUT}"
            )
        for loss in losses:
            nodes = leave_out_labels(loss, rewriter)
            label_flops += _flops(nodes, rewriter.index, trainable)
        rewriter.finish()
        rewriter = Rewriter(graph)
    if padding:
        nodes = Padding(rewriter, losses, labels).leave_out()
        padding_flops = _flops(nodes, rewriter.index, trainable)
        rewriter.finish()
    return Savings(padding_flops, label_flops)


def _flops(nodes: Iterable[Any], index: GraphIndex, trainable: frozenset[str]) -> int:
    """Of the nodes' matrix products, for one row, forward and backward."""
    total = 0
    for node in nodes:
        shape = index.shapes.get(node.input[1], []) if node.op_type in PRODUCTS else []
        if len(shape) == 2 and all(isinstance(size, int) for size in shape):
            is_trained = not trainable.isdisjoint(index.ancestors(node.input[1]))
            total += 2 * math.prod(map(int, shape)) * (3 if is_trained else 2)
    return total
