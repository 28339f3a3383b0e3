"""The gradient of an embedding, written to memory that is kept (memory.py)."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ort_train.ortmodule import memory
from ort_train.ortmodule.aten import direct


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


@functools.cache
def register() -> None:
    """With the ATen executor, for the life of the process."""
    direct("embedding_backward")(_gradient)
