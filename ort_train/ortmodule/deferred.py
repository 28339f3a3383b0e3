"""A tensor that is computed when it is first used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

#: What is known of it without its values; wrappers of a model ask each output for these.
_KNOWN = frozenset(
    [
        torch.Tensor.dtype.__get__,
        torch.Tensor.device.__get__,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_complex,
        torch.is_floating_point,
        torch.is_complex,
    ]
)


class DeferredTensor(torch.Tensor):
    """Stands for a tensor until an operator, a shape or a value of it is asked for.

    Made by :func:`deferred`.
    """

    _compute: Callable[[], torch.Tensor]
    _value: torch.Tensor | None

    def materialized(self) -> torch.Tensor:
        """The tensor itself, computed once."""
        if self._value is None:
            self._value = self._compute()
        return self._value

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(
            DeferredTensor, DeferredTensor.materialized, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def deferred(
    compute: Callable[[], torch.Tensor], dtype: torch.dtype, device: torch.device
) -> DeferredTensor:
    """A stand-in for what `compute` returns, called at most once.

    Args:
        dtype: of the result.
        device: of the result.
    """
    tensor = torch.empty(0, dtype=dtype, device=device).as_subclass(DeferredTensor)
    tensor._compute, tensor._value = compute, None
    return tensor
