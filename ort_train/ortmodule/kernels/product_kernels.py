"""Matrix products that torch computes, by oneDNN: the kernels of products.py.

Between two products of a step little of torch's or Python's code stays in the processor's cache,
and a call takes 10 to 40 us that takes one in a loop. So a result of usual size takes as few calls
as can be; what has a block of its own (memory.py) takes its time anyway.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch

from ort_train.ortmodule.kernels import memory, onednn, rounded_weights
from ort_train.ortmodule.kernels.aten import BF16_SUFFIX
from ort_train.ortmodule.kernels.direct import direct

ROUND = "ort_train::to_bf16"
#: A product in bf16 is computed and widened in parts of so many entries, but so many rows at least,
#: which stay in the cache in between.
_ROUNDED_ENTRIES, _ROUNDED_ROWS = 2**20, 512

direct(ROUND)(rounded_weights.of)


def _flattened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.flatten(0, -2)


def _tn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(_flattened(a).t(), _flattened(b))


def _tt(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(_flattened(a).t(), b.t())


#: By whether a and b are transposed first. Leading axes of `a` are flattened into its rows, and of
#: `b` where both are flattened; the product has those of an untransposed `a`.
_MULTIPLY = {
    (False, False): torch.matmul,
    (False, True): torch.nn.functional.linear,
    (True, False): _tn,
    (True, True): _tt,
}


def _sizes(a: torch.Tensor, b: torch.Tensor, a_t: bool, b_t: bool) -> tuple[int, int]:
    """Rows and columns of the product."""
    rows = a.shape[-1] if a_t else math.prod(a.shape[:-1])
    return rows, b.shape[0] if b_t else b.shape[-1]


def _factors(
    a: torch.Tensor, b: torch.Tensor, a_t: bool, b_t: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the matrices that are multiplied."""
    left, right = _flattened(a), _flattened(b)
    return left.t() if a_t else left, right.t() if b_t else right


def _unflattened(result: torch.Tensor, a: torch.Tensor, a_t: bool) -> torch.Tensor:
    """With the leading axes of an untransposed left factor."""
    return result if a_t or a.dim() == 2 else result.view(*a.shape[:-1], result.shape[1])


def _product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, *, a_t: bool, b_t: bool
) -> torch.Tensor:
    """a · b + bias, each factor transposed first where its flag says so, in fp32.

    Beside an `a` in bf16, a `b` in fp32 is a weight that is rounded once (rounded_weights.py).
    """
    sizes = _sizes(a, b, a_t, b_t)
    is_large = memory.is_large(sizes, torch.float32)
    if a.dtype == torch.float32:
        if is_large or (bias is not None and (a_t or not b_t)):
            result = memory.empty(*sizes, dtype=torch.float32)
            onednn.product(*_factors(a, b, a_t, b_t), bias, out=result)
            return _unflattened(result, a, a_t)
        if bias is None:
            return onednn.preferred(_MULTIPLY[a_t, b_t], a, b)
        return onednn.preferred(torch.nn.functional.linear, a, b, bias)
    if b.dtype == torch.float32:
        b = rounded_weights.of(b)
    if is_large or sizes[0] * sizes[1] > _ROUNDED_ENTRIES:
        result = _unflattened(_widened_in_parts(*_factors(a, b, a_t, b_t)), a, a_t)
    else:
        result = _MULTIPLY[a_t, b_t](a, b).float()
    return result if bias is None else result.add_(bias)


def _widened_in_parts(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    rows, columns = left.shape[0], right.shape[1]
    result = memory.empty(rows, columns, dtype=torch.float32)
    step = max(_ROUNDED_ENTRIES // max(columns, 1), _ROUNDED_ROWS)
    rounded = memory.empty(min(step, rows), columns, dtype=torch.bfloat16)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        result[part] = torch.mm(left[part], right, out=rounded[: part.stop - first])
    return result


def _product_in_bf16(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, *, a_t: bool, b_t: bool
) -> torch.Tensor:
    """The same of factors in bf16, handed on in bf16; the bias is rounded, as under autocast."""
    if b.dtype == torch.float32:
        b = rounded_weights.of(b)
    sizes = _sizes(a, b, a_t, b_t)
    if memory.is_large(sizes, torch.bfloat16) or (bias is not None and (a_t or not b_t)):
        left, right = _factors(a, b, a_t, b_t)
        result = memory.empty(*sizes, dtype=torch.bfloat16)
        if bias is None:
            torch.mm(left, right, out=result)
        else:
            torch.addmm(bias.bfloat16(), left, right, out=result)
        return _unflattened(result, a, a_t)
    if bias is None:
        return _MULTIPLY[a_t, b_t](a, b)
    return torch.nn.functional.linear(a, b, bias.bfloat16())


def _batched_product(a: torch.Tensor, b: torch.Tensor, *, a_t: bool, b_t: bool) -> torch.Tensor:
    """Products of the last two axes, broadcast over the others, in fp32."""
    rounded = _batched_product_in_bf16(a, b, a_t=a_t, b_t=b_t)
    if not memory.is_large(rounded.shape, torch.float32):
        return rounded.float()
    return memory.empty(*rounded.shape, dtype=torch.float32).copy_(rounded)


def _batched_product_in_bf16(
    a: torch.Tensor, b: torch.Tensor, *, a_t: bool, b_t: bool
) -> torch.Tensor:
    left, right = a.mT if a_t else a, b.mT if b_t else b
    batch = left.shape[:-2]
    if batch != right.shape[:-2]:
        batch = torch.broadcast_shapes(batch, right.shape[:-2])
    sizes = (*batch, left.shape[-2], right.shape[-1])
    if not memory.is_large(sizes, torch.bfloat16):
        return torch.matmul(left, right)
    return torch.matmul(left, right, out=memory.empty(*sizes, dtype=torch.bfloat16))


_TRANSPOSED = tuple(itertools.product((False, True), repeat=2))


def _operators(kind: str) -> dict[tuple[bool, bool], str]:
    return {(a_t, b_t): f"ort_train::{kind}_{'nt'[a_t]}{'nt'[b_t]}" for a_t, b_t in _TRANSPOSED}


#: What multiplies, by whether a and b are transposed first: matrices, and the last two axes.
PRODUCTS, BATCHED_PRODUCTS = _operators("product"), _operators("batched_product")

for _names, _in_fp32, _in_bf16 in (
    (PRODUCTS, _product, _product_in_bf16),
    (BATCHED_PRODUCTS, _batched_product, _batched_product_in_bf16),
):
    for (_a_t, _b_t), _name in _names.items():
        direct(_name)(functools.partial(_in_fp32, a_t=_a_t, b_t=_b_t))
        direct(_name + BF16_SUFFIX)(functools.partial(_in_bf16, a_t=_a_t, b_t=_b_t))
