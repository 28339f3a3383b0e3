"""Matrix products that torch computes, by oneDNN: the kernels of products.py."""

from __future__ import annotations

import functools
import itertools

import torch

from ort_train.ortmodule import bf16_values, memory, onednn, rounded_weights
from ort_train.ortmodule.aten import direct

ROUND = "ort_train::to_bf16"
#: A product in bf16 is computed and widened in parts of so many entries, but so many rows at least,
#: which stay in the cache in between.
_ROUNDED_ENTRIES, _ROUNDED_ROWS = 2**20, 512


direct(ROUND)(rounded_weights.of)


def _flattened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _factors(
    a: torch.Tensor, b: torch.Tensor, a_t: bool, b_t: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the matrices that are multiplied, of one type: a frozen weight comes as it is."""
    if a.dtype != b.dtype:
        b = rounded_weights.of(b)
    left, right = _flattened(a), _flattened(b)
    return left.t() if a_t else left, right.t() if b_t else right


def _unflattened(result: torch.Tensor, a: torch.Tensor, a_t: bool) -> torch.Tensor:
    """With the leading axes of an untransposed left factor."""
    return result if a_t or a.dim() == 2 else result.view(*a.shape[:-1], result.shape[1])


def _product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, *, a_t: bool, b_t: bool
) -> torch.Tensor:
    """a · b + bias of matrices, each transposed first where its flag says so, in fp32.

    Leading axes of `a` are flattened into its rows, and of `b` where both are flattened; the
    product has those of an untransposed `a`.
    """
    left, right = _factors(a, b, a_t, b_t)
    rows, columns = left.shape[0], right.shape[1]
    result = memory.empty(rows, columns, dtype=torch.float32)
    if a.dtype == torch.float32:
        onednn.product(left, right, bias, out=result)
    else:
        step = max(_ROUNDED_ENTRIES // max(columns, 1), _ROUNDED_ROWS)
        rounded = memory.empty(min(step, rows), columns, dtype=torch.bfloat16)
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            result[part] = torch.mm(left[part], right, out=rounded[: part.stop - first])
        if bias is not None:
            result += bias
    return _unflattened(result, a, a_t)


def _product_in_bf16(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, *, a_t: bool, b_t: bool
) -> torch.Tensor:
    """The same of factors in bf16, handed on in bf16; the bias is rounded, as under autocast."""
    left, right = _factors(a, b, a_t, b_t)
    result = memory.empty(left.shape[0], right.shape[1], dtype=torch.bfloat16)
    if bias is None:
        torch.mm(left, right, out=result)
    else:
        torch.addmm(bias.bfloat16(), left, right, out=result)
    return _unflattened(result, a, a_t)


def _batched_product(a: torch.Tensor, b: torch.Tensor, *, a_t: bool, b_t: bool) -> torch.Tensor:
    """Products of the last two axes, broadcast over the others, in fp32."""
    rounded = _batched_product_in_bf16(a, b, a_t=a_t, b_t=b_t)
    return memory.empty(*rounded.shape, dtype=torch.float32).copy_(rounded)


def _batched_product_in_bf16(
    a: torch.Tensor, b: torch.Tensor, *, a_t: bool, b_t: bool
) -> torch.Tensor:
    left, right = a.mT if a_t else a, b.mT if b_t else b
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    rounded = memory.empty(*batch, left.shape[-2], right.shape[-1], dtype=torch.bfloat16)
    return torch.matmul(left, right, out=rounded)


def operator(kind: str, a_t: bool, b_t: bool) -> str:
    """The name of what computes a kind of product, of factors that are transposed first or not."""
    return f"ort_train::{kind}_{'t' if a_t else 'n'}{'t' if b_t else 'n'}"


for _a_t, _b_t in itertools.product((False, True), repeat=2):
    for _name, _function in (
        (operator("product", _a_t, _b_t), _product),
        (operator("product", _a_t, _b_t) + bf16_values.SUFFIX, _product_in_bf16),
        (operator("batched_product", _a_t, _b_t), _batched_product),
        (operator("batched_product", _a_t, _b_t) + bf16_values.SUFFIX, _batched_product_in_bf16),
    ):
        direct(_name)(functools.partial(_function, a_t=_a_t, b_t=_b_t))
