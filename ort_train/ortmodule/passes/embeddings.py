"""The gradient of an embedding, written to memory that is kept (memory.py).

Where the head has the embedding's weight, the rows are added to the head's gradient: a gradient of
the weight's size less to make, to fill with zeros and to add.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ort_train.ortmodule.graph import GraphIndex, declare
from ort_train.ortmodule.kernels import memory
from ort_train.ortmodule.kernels.aten import aten_node, operator_name
from ort_train.ortmodule.kernels.direct import direct

_GRADIENT = "embedding_backward"
_ADD_GRADIENT = "ort_train::add_embedding_gradient"


def _gradient(
    grad: torch.Tensor,
    indices: torch.Tensor,
    num_weights: torch.Tensor,
    padding_idx: torch.Tensor,
    scale_grad_by_freq: torch.Tensor,
    sparse: torch.Tensor,
) -> torch.Tensor:
    """torch.ops.aten.embedding_backward.

    Args:
        grad: (..., H)
        indices: (...), of the rows that were looked up.
        num_weights: number of rows.
        padding_idx: a row without gradient, or a negative number.
        scale_grad_by_freq: divide a row's gradient by how often it was looked up.
        sparse: return a sparse tensor.

    Returns:
        (num_weights, H)
    """
    rows, padding = int(num_weights), int(padding_idx)
    is_scaled, is_sparse = bool(scale_grad_by_freq), bool(sparse)
    shape = rows, grad.shape[-1]
    is_large = grad.dtype == torch.float32 and memory.is_large(shape, grad.dtype)
    if grad.device.type != "cpu" or is_scaled or is_sparse or not is_large:
        result: Any = torch.ops.aten.embedding_backward(
            grad, indices, rows, padding, is_scaled, is_sparse
        )
        return result
    # torch's own allocates, and adds in the same order.
    result = memory.empty(*shape, dtype=grad.dtype).zero_()
    result.index_add_(0, indices.flatten(), grad.reshape(-1, shape[1]))
    if padding >= 0:
        result[padding] = 0
    return result


@direct(_ADD_GRADIENT)
def _add_gradient(
    total: torch.Tensor, grad: torch.Tensor, *arguments: torch.Tensor
) -> torch.Tensor:
    """`total` with the gradient added to it in place; the other arguments are _gradient's."""
    indices, _, padding_idx, scale_grad_by_freq, sparse = arguments
    if bool(scale_grad_by_freq) or bool(sparse):
        return total.add_(_gradient(grad, *arguments))
    row_of, rows, padding = indices.flatten(), grad.reshape(-1, grad.shape[-1]), int(padding_idx)
    if padding >= 0:
        rows = rows.masked_fill((row_of == padding)[:, None], 0)
    return total.index_add_(0, row_of, rows)


def add_to_products(graph: Any, is_product: Callable[[Any], bool]) -> None:
    """Add embeddings' gradients to the other gradient of the same weight, in its memory.

    Args:
        graph: onnx.GraphProto of forward and backward, changed in place.
        is_product: of a node, whether torch computes a product in memory of its own: what ONNX
            Runtime has allocated it may give to another value, as soon as its last reader has run.
    """
    index = GraphIndex(graph)
    nodes: list[Any] = []
    for node in graph.node:
        parts = {
            name: index.producers[name]
            for name in node.input
            if index.num_reads(name) == 1 and name in index.producers
        }
        gradients = [name for name, part in parts.items() if operator_name(part) == _GRADIENT]
        totals = [name for name, part in parts.items() if is_product(part)]
        if node.op_type != "Sum" or len(totals) != 1 or {*totals, *gradients} != {*node.input}:
            nodes.append(node)
            continue
        (total,) = totals
        for name in gradients:
            part = parts[name]
            nodes.remove(part)
            output = node.output[0] if name == gradients[-1] else f"{name}/total"
            declare(graph, [output])
            nodes.append(aten_node(_ADD_GRADIENT, [total, *part.input], [output], part.name))
            total = output
    del graph.node[:]
    graph.node.extend(nodes)


@functools.cache
def register() -> None:
    """With the ATen executor, for the life of the process."""
    direct(_GRADIENT, numbers=[2, 3, 4, 5])(_gradient)
