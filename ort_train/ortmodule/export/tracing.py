"""Refusing what a trace would freeze: Python decisions that are taken on a batch's values.

The exporter runs a module's forward on one batch and records the tensor operators. A branch, a loop
count or a Python number that came out of that batch's values is the same for all later batches, and
the graph is silently wrong. Numbers that come from shapes are recorded as operators. Comparing them
is left alone, as models ask for sizes at every turn: where another batch's size would decide
otherwise, its graph goes on as the first batch decided, and `len(x)` stays what it was there.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.patching import replaced

#: Operators whose result has a shape that depends on values, by the node kind in a trace.
_SHAPED_BY_VALUES = frozenset(
    f"aten::{name}"
    for name in ("nonzero", "nonzero_numpy", "masked_select", "unique_dim", "_unique2", "bincount")
)
_SHAPES = frozenset({"aten::size", "aten::numel", "aten::len", "aten::dim"})
#: Of torch.Tensor: what makes something else than a tensor of the trace out of values.
_CONVERSIONS = (
    "__bool__", "__int__", "__float__", "__index__", "item", "tolist",
    "numpy", "__array__", "__deepcopy__",
)  # fmt: skip
#: Of torch and of torch.Tensor.
_COMPARISONS = ("equal", "allclose", "is_nonzero")


class _Origins:
    """Whether values of one trace depend on the batch's values, each looked up once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bool], bool] = {}

    def depends(self, value: Any, of_shape: bool = False) -> bool:
        """Whether a value of the trace, or its shape alone, depends on the batch's values."""
        stack = [(value, of_shape)]
        children: dict[tuple[str, bool], list[tuple[Any, bool]]] = {}
        while stack:
            item, shape = stack[-1]
            key = (item.debugName(), shape)
            if key in self._known:
                stack.pop()
                continue
            if key not in children:
                children[key] = self._sources(item, shape)
                stack.extend(children[key])
                continue
            stack.pop()
            leaf = not children[key] and self._is_batch(item, shape)
            self._known[key] = leaf or any(
                self._known.get((source.debugName(), s), False) for source, s in children[key]
            )
        return self._known[(value.debugName(), of_shape)]

    @staticmethod
    def _is_batch(value: Any, of_shape: bool) -> bool:
        kind = value.node().kind()
        return kind in _SHAPED_BY_VALUES if of_shape else kind == "prim::Param"

    @staticmethod
    def _sources(value: Any, of_shape: bool) -> list[tuple[Any, bool]]:
        node = value.node()
        if of_shape and node.kind() in _SHAPED_BY_VALUES:
            return []
        shape = of_shape or node.kind() in _SHAPES
        return [(source, shape) for source in node.inputs()]


def _place() -> str:
    """The line of the model that asked, as "file.py:12 (the code)"."""
    passed = Path(__file__), Path(copy.__file__)
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path not in passed and "torch" not in path.parts:
            return f"{path.name}:{frame.lineno} ({(frame.line or frame.name)[:80]})"
    return "an unknown place"


@contextlib.contextmanager
def values_kept_out() -> Iterator[None]:
    """While tracing, no Python number, array or copy may be made of the batch's values.

    Raises:
        UnsupportedModelError: naming the line that asked for one.
    """
    origins = _Origins()

    def guarded(convert: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if torch.jit.is_tracing() and torch._C._get_tracing_state() is not None:
                tensors = (each for each in args if isinstance(each, torch.Tensor))
                traced = map(torch._C._get_value_trace, tensors)
                if any(value is not None and origins.depends(value) for value in traced):
                    raise UnsupportedModelError(
                        f"{_place()} makes a Python number or array of the batch's values, which "
                        "a graph would keep for all batches: write it with tensor operators "
                        "(torch.where), or train with backend='compile' or 'eager'"
                    )
            return convert(*args, **kwargs)

        return wrapper

    guards = {name: guarded(getattr(torch.Tensor, name)) for name in (*_CONVERSIONS, *_COMPARISONS)}
    functions = {name: guarded(getattr(torch, name)) for name in _COMPARISONS}
    with replaced(torch.Tensor, **guards), replaced(torch, **functions):
        yield
