"""Results of common operators by their sizes alone.

torch computes most of them for the meta device in Python, for data types and strides as well, in
0.1 to 2 ms each; a model asks for thousands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _same(tensor: torch.Tensor, *_: Any) -> torch.Tensor | None:
    return tensor if tensor.is_floating_point() else None


def _broadcast(tensor: Any, other: Any, *_: Any) -> torch.Tensor | None:
    if not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()):
        return None
    if not isinstance(other, torch.Tensor) or other.dim() == 0:
        return tensor
    if other.dtype != tensor.dtype:
        return None
    if other.shape == tensor.shape:
        return tensor
    return _empty(torch.broadcast_shapes(tensor.shape, other.shape), tensor)


def _linear(tensor: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor | None:
    if weight.dim() != 2 or weight.shape[1] != tensor.shape[-1]:
        return None
    return _empty((*tensor.shape[:-1], weight.shape[0]), tensor)


def _reduced(
    tensor: torch.Tensor, dims: list[int] | None, keep: bool, dtype: int | None
) -> torch.Tensor | None:
    if not dims or not tensor.is_floating_point() or dtype is not None:
        return None
    reduced = {dim % tensor.dim() for dim in dims}
    sizes = [(1 if i in reduced else size) for i, size in enumerate(tensor.shape)]
    return _empty(sizes if keep else [s for i, s in enumerate(sizes) if i not in reduced], tensor)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> torch.Tensor | None:
    if query.shape[:-2] != value.shape[:-2] or key.shape[-2] != value.shape[-2]:
        return None
    return _empty((*query.shape[:-1], value.shape[-1]), query)


def _reshape(tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return tensor.reshape(sizes)  # strides here are not those of the run


def _grouped_linear(
    tensor: torch.Tensor, weight: torch.Tensor, _: Any, is_transposed: bool
) -> torch.Tensor:
    return _empty((tensor.shape[0], weight.shape[2 if is_transposed else 1]), tensor)


def _linear_4bit(
    tensor: torch.Tensor, packed: Any, absmax: Any, block: int, kind: int, num_rows: int, *_: Any
) -> torch.Tensor:
    return _empty((*tensor.shape[:-1], num_rows), tensor)


def _split_groups(tensor: torch.Tensor, _: Any, num_groups: int) -> list[torch.Tensor]:
    # The groups' own sizes are values; together they have all rows.
    return [tensor, *[tensor[:0]] * (num_groups - 1)]


def _empty(sizes: Any, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(sizes, dtype=like.dtype, device="meta")


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        [
            f"aten::{name}"
            for name in (
                "abs", "clone", "contiguous", "cos", "detach", "dropout", "exp", "gelu",
                "layer_norm", "neg", "pow.Tensor_Scalar", "relu", "rsqrt", "sigmoid", "silu",
                "sin", "sqrt", "tanh",
            )
        ],
        _same,
    ),
    **dict.fromkeys(
        ("aten::add.Tensor", "aten::div.Tensor", "aten::mul.Tensor", "aten::sub.Tensor"), _broadcast
    ),
    **dict.fromkeys(("aten::mean.dim", "aten::sum.dim_IntList"), _reduced),
    "aten::linear": _linear,
    "aten::scaled_dot_product_attention": _attention,
    "aten::reshape": _reshape,
    "aten::view": _reshape,
    "ort_train::grouped_linear": _grouped_linear,
    "ort_train::linear_4bit": _linear_4bit,
    "ort_train::split_groups": _split_groups,
}  # fmt: skip


def result(operator: str, arguments: list[Any]) -> Any:
    """Tensors of the sizes of the operator's result; None where torch has to be asked.

    Args:
        operator: its name and overload, "aten::mul.Tensor".
        arguments: tensors among them are of the meta device.
    """
    rule = _RULES.get(operator)
    return None if rule is None else rule(*arguments)
