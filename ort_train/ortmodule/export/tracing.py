"""What a trace would freeze: Python decisions that are taken on a batch.

The exporter runs a module's forward on one batch and records the tensor operators. A branch, a loop
count or a Python number that came out of that batch is the same for all later batches, and the
graph is silently wrong. Those that came out of the batch's values are refused. Those that came out
of its sizes are recorded with what led to them (recorder.py), as models ask for sizes at every
turn: a batch whose sizes decide otherwise gets a graph of its own (decisions.py).
"""

from __future__ import annotations

import contextlib
import copy
import linecache
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.export.recorder import SHAPES, Recorder
from ort_train.ortmodule.patching import replaced

#: Operators whose result has a shape that depends on values, by the node kind in a trace.
_SHAPED_BY_VALUES = frozenset(
    f"aten::{name}"
    for name in ("nonzero", "nonzero_numpy", "masked_select", "unique_dim", "_unique2", "bincount")
)
#: Of torch.Tensor: what makes something else than a tensor of the trace out of values.
_CONVERSIONS = (
    "__bool__", "__int__", "__float__", "__index__", "item", "tolist",
    "numpy", "__array__", "__deepcopy__",
)  # fmt: skip
#: Of torch and of torch.Tensor.
_COMPARISONS = ("equal", "allclose", "is_nonzero")
_BRANCHES = frozenset({"__bool__", "is_nonzero"})


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
        shape = of_shape or node.kind() in SHAPES
        return [(source, shape) for source in node.inputs()]


#: Frames of ours, between the model and what it calls.
_OURS = Path(__file__).parent


def _place() -> str:
    """The line of the model that asked, as "file.py:12 (the code)"."""
    for frame, number in traceback.walk_stack(None):
        name = frame.f_code.co_filename
        path = Path(name)
        if name != copy.__file__ and path.parent != _OURS and "torch" not in path.parts:
            line = linecache.getline(name, number).strip() or frame.f_code.co_name
            return f"{path.name}:{number} ({line[:80]})"
    return "an unknown place"


class _Indexing(TorchFunctionMode):
    """Knows when a tensor is indexed, by what a trace follows though Python asks for its number,
    and what of slices and divisions is decided by a batch's sizes.

    A method in place of `Tensor.__getitem__` would make tensors sequences to `torch.tensor`.
    """

    is_followed = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = _Indexing.is_followed
        frame = sys._getframe(1)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            # Of a list, a trace keeps the numbers.
            _Indexing.is_followed = not any(isinstance(e, list | tuple | range) for e in index)
        elif func in _DIVISIONS:
            _DIVISIONS[func](*args, **kwargs or {})
        try:
            result = _called_from(frame, func, args, kwargs or {})
        finally:
            _Indexing.is_followed = before
        if func is torch.Tensor.__getitem__ and isinstance(result, torch.Tensor):
            for axis in _single_entries(args[0], index, result):
                single = (*[slice(None)] * axis, slice(0, 1))
                if result.shape[axis] == 1:  # a decision, which the trace keeps
                    result = _called_from(frame, func, (result, single), {})
        return result


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """What is done meanwhile is no part of the trace."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def _decide_by_length(tensor: Any, dim: int = 0) -> None:
    """A trace keeps into how many parts a tensor is divided, and how long each is."""
    if isinstance(tensor, torch.Tensor):
        int(tensor.shape[dim])


def _decide_by_split(
    tensor: Any, split_size_or_sections: Any = None, dim: int = 0, **other: Any
) -> None:
    if isinstance(split_size_or_sections, int):  # or other lengths fail
        _decide_by_length(tensor, dim)


_DIVISIONS: dict[Any, Callable[..., None]] = {
    **dict.fromkeys((torch.split, torch.functional.split, torch.Tensor.split), _decide_by_split),
    **dict.fromkeys((torch.unbind, torch.Tensor.unbind), _decide_by_length),
}


def _single_entries(
    tensor: torch.Tensor, index: tuple[Any, ...], result: torch.Tensor
) -> Iterator[int]:
    """Axes of a slicing's result that have one entry in this batch, and of others more.

    Upstream takes their size for the one that it broadcasts to (see upstream.py, which knows of
    slices that have one entry in all batches).
    """
    plain = (slice, int, type(None), type(Ellipsis))  # not bool, and no tensor
    if not all(type(each) in plain for each in index):
        return
    with _untraced():
        before, after = tuple(tensor.shape), tuple(result.shape)
    num_indexed = sum(isinstance(each, slice | int) for each in index)
    source = target = 0
    for each in index:
        if each is Ellipsis:
            source += len(before) - num_indexed
            target += len(before) - num_indexed
        elif each is None:
            target += 1
        elif isinstance(each, int):
            source += 1
        else:
            is_single = after[target] == 1 and before[source] != 1
            if is_single and not _is_always_single(each):
                yield target
            source, target = source + 1, target + 1


def _is_always_single(each: slice) -> bool:
    """Whether it has one entry whatever the batch: [k : k + 1], or [-1:]."""
    start = 0 if each.start is None else each.start
    if type(start) is not int or not (each.step is None or type(each.step) is int):
        return False  # a size of the batch
    if each.stop is None:
        return start == -1
    return type(each.stop) is int and each.stop == start + 1


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _called_from(frame: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`, which a trace takes to stand in this frame's line.

    The exporter takes slices for parts of one write where their lines are the same
    (`remove_inplace_ops_for_onnx.cpp`), and its errors name a line.
    """
    line = frame.f_lineno or frame.f_code.co_firstlineno
    code = _call.__code__.replace(
        co_filename=frame.f_code.co_filename,
        co_firstlineno=line - 1,  # of its `def`
    )
    return FunctionType(code, frame.f_globals)(func, args, kwargs)


#: What records the decisions of the forward that is traced, if any.
_recorder: Recorder | None = None


@contextlib.contextmanager
def decisions_recorded(tensors: tuple[torch.Tensor, ...]) -> Iterator[Recorder]:
    """The forward that is traced meanwhile, of a call with these tensors, may decide by sizes."""
    global _recorder
    _recorder = Recorder(tensors)
    try:
        with _Indexing():
            yield _recorder
    finally:
        _recorder = None


@contextlib.contextmanager
def values_kept_out() -> Iterator[None]:
    """While tracing, no Python number, array or copy may be made of the batch's values.

    Raises:
        UnsupportedModelError: naming the line that asked for one.
    """
    origins = _Origins()

    def look_at(name: str, args: tuple[Any, ...]) -> None:
        for tensor in args:
            if not isinstance(tensor, torch.Tensor):
                continue
            value = torch._C._get_value_trace(tensor)
            if value is None:
                continue
            if origins.depends(value):
                raise UnsupportedModelError(
                    f"{_place()} makes a Python number or array of the batch's values, which "
                    "a graph would keep for all batches: write it with tensor operators "
                    "(torch.where), or train with backend='compile' or 'eager'"
                )
            if _recorder is not None and not _Indexing.is_followed:
                _recorder.record(tensor, name in _BRANCHES, _place())

    def guarded(name: str, convert: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if torch.jit.is_tracing() and torch._C._get_tracing_state() is not None:
                look_at(name, args)
            return convert(*args, **kwargs)

        return wrapper

    def iterate(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        if tensor.dim() > 0:
            len(tensor)  # as many parts as it has are traced
        return iterate_traced(tensor)

    iterate_traced = torch.Tensor.__iter__
    names = (*_CONVERSIONS, *_COMPARISONS)
    guards = {name: guarded(name, getattr(torch.Tensor, name)) for name in names}
    guards["__iter__"] = iterate
    functions = {name: guarded(name, getattr(torch, name)) for name in _COMPARISONS}
    with replaced(torch.Tensor, **guards), replaced(torch, **functions):
        yield
