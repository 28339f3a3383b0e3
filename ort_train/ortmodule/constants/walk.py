"""A walk through all values that a forward may read beside parameters and buffers.

They are attributes of modules, configs, other objects and classes, entries of lists and
dictionaries, closures, and globals of the user's own code. A trace makes constants of them all. The
plain ones of modules and configs count always; objects, functions and classes where code that the
forward reaches names them (reached_code.py).

Not seen are entries of containers with more than `_MAX_ENTRIES`, globals of libraries, and what
objects keep outside of Python.
"""

from __future__ import annotations

import argparse
import enum
import itertools
import operator
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ort_train.ortmodule.cache import bytecode
from ort_train.ortmodule.cache.packages import is_known, is_of_the_user
from ort_train.ortmodule.constants.reached_code import (
    ReachedCode,
    global_names,
    is_special,
    runs_functions,
)

_PLAIN = (
    int, float, complex, bool, str, bytes, type(None), type(...), range, slice, enum.Enum,
    np.generic, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
_CONTAINERS = (dict, types.MappingProxyType, list, tuple, deque)
#: Containers with more entries are no settings, but tables.
_MAX_ENTRIES = 1024
#: Larger arrays are data: they have no version as tensors have, and are compared at every step.
_MAX_ARRAY_BYTES = 2**16
#: Before the path of a global.
GLOBAL = "global "
_NOTHING = object()
#: torch's own of every module (`training` is in a graph's key), and transformers' that change in
#: training and change no number: a training graph never has a cache.
_NOT_OF_THE_FORWARD = frozenset((*torch.nn.Module().__dict__, "use_cache", "warnings_issued"))
#: Of a module that is no part of the one that is trained, its tensors count.
_OF_OTHER_MODULES = frozenset(("_parameters", "_buffers", "_modules", "training"))
#: Of configs: what transformers' save_pretrained writes. Types of parameters are in a graph's key.
_WRITTEN_BY_SAVING = frozenset(
    ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
)


class Holder(NamedTuple):
    """Something that holds values, and those that were taken from it."""

    take: Callable[[Any], tuple[Any, ...]]
    held: Any
    values: tuple[Any, ...]

    @classmethod
    def of(cls, getter: type, held: Any, names: list[Any]) -> Holder:
        """Of names, by operator.itemgetter or operator.attrgetter."""
        take = getter(*names, names[0])  # for two at least, a getter returns a tuple
        return cls(take, held, take(held))


class Walk:
    """All that counts, found in one walk.

    Args:
        module: whose parts are walked through.
        forward: the module's own.
        code: that they reach; what is met on the way is added.
        left_out: paths that don't count, nor what lies behind them.

    Attributes:
        leaves: by path; of what holds others, its kind and size.
        named: paths of attributes and globals that code names.
        holders: of everything.
        sized: those of them that may grow.
        tensors: among the leaves.
        compared: what is compared by value at every step, and a function that takes its value.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        forward: Callable[..., Any],
        code: ReachedCode,
        left_out: set[str],
    ) -> None:
        self._code = code
        self._left_out = left_out
        self._parts = dict(module.named_modules())
        state = itertools.chain(
            self._parts.items(), module.named_parameters(), module.named_buffers()
        )
        self._state = {id(each): name for name, each in state}
        code.add([forward, *map(type, self._parts.values())])
        num_names = -1
        while num_names != len(code.names):  # an object's methods may name what was passed over
            num_names = len(code.names)
            self._walk(module, forward)

    def _walk(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        self.leaves: dict[str, Any] = {}
        self.named: set[str] = set()
        self.holders: list[Holder] = []
        self.sized: list[Any] = []
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.compared: list[tuple[Callable[[Any], Any], Any]] = []
        self._waiting: deque[tuple[str, Any, bool]] = deque()
        self._met: set[int] = set()
        self._add("forward", forward, True)
        for path, part in self._parts.items():
            self._met.add(id(part))
            # The module's own hooks run around the graph, as does its new forward.
            is_whole = part is module
            hooks = {} if is_whole else {**part._forward_hooks, **part._forward_pre_hooks}
            for number, hook in hooks.items():
                self._add(f"{path}.hook {number}", hook, True)
            left_out = _NOT_OF_THE_FORWARD | ({"forward"} if is_whole else set())
            self._attributes(path, vars(part), left_out, are_all_read=True)
        self._follow()
        num_functions = num_classes = 0
        while num_functions < len(self._code.functions) or num_classes < len(self._code.classes):
            functions = self._code.functions[num_functions:]
            classes = self._code.classes[num_classes:]
            num_functions += len(functions)
            num_classes += len(classes)
            for function in functions:
                self._outside(function)
            for kind in classes:
                self._class(kind)
            self._follow()

    def _follow(self) -> None:
        """Look into what was met."""
        while self._waiting:
            path, value, is_named = self._waiting.popleft()
            if id(value) in self._met:
                continue
            self._met.add(id(value))
            if isinstance(value, types.MethodType):
                self._add(f"{path}.__self__", value.__self__, True)
            elif _is_container(value):
                self._entries(path, value, is_named)
            else:
                self._object(path, value)

    def _add(self, path: str, value: Any, is_named: bool) -> bool:
        """Whether a value counts."""
        if path in self._left_out:
            return False
        leaf = self._leaf(path, value, is_named)
        if leaf is _NOTHING:
            return False
        self.leaves[path] = leaf
        return True

    def _leaf(self, path: str, value: Any, is_named: bool) -> Any:
        """What there is to be known of a value; `_NOTHING` where it doesn't count."""
        if isinstance(value, _PLAIN):
            return value
        if (name := self._state.get(id(value))) is not None:
            return f"part {name!r}"
        if isinstance(value, torch.Tensor):
            is_dense = value.layout == torch.strided and value.device.type != "meta"
            if is_dense:
                self.tensors.append((path, value))
            return value if is_dense else type(value)
        if isinstance(value, np.ndarray):
            if value.nbytes > _MAX_ARRAY_BYTES or value.dtype.hasobject:
                return type(value)
            self.compared.append((_array_value, value))
            return _array_value(value)
        if isinstance(value, set | frozenset):
            if not all(isinstance(each, _PLAIN) for each in value):
                return type(value)
            self.compared.append((frozenset, value))
            return frozenset(value)
        if _is_container(value):
            if len(value) <= _MAX_ENTRIES:
                self._waiting.append((path, value, is_named))
            return type(value), len(value)
        if not (is_named or _is_config(path)):
            return _NOTHING
        if isinstance(value, type) or runs_functions(value):
            self._code.add([value])
            if isinstance(value, types.MethodType):
                self._waiting.append((path, value, is_named))
            return value
        if isinstance(value, types.ModuleType):
            if is_of_the_user(value.__name__):
                self._waiting.append((path, value, is_named))
            return value
        if isinstance(value, torch.nn.Module | argparse.Namespace | types.SimpleNamespace) or (
            not is_known(type(value).__module__)
        ):
            self._waiting.append((path, value, is_named))
            return type(value)
        return value if callable(value) else _NOTHING

    def _hold(self, getter: type, held: Any, names: list[Any], is_growing: bool) -> None:
        if names:
            self.holders.append(Holder.of(getter, held, names))
        if is_growing:
            self.sized.append(held)

    def _entries(self, path: str, container: Any, is_named: bool) -> None:
        is_mapping = isinstance(container, dict | types.MappingProxyType)
        items = list(container.items()) if is_mapping else list(enumerate(container))
        names = [key for key, value in items if self._add(f"{path}[{key!r}]", value, is_named)]
        self._hold(operator.itemgetter, container, names, not isinstance(container, tuple))

    def _attributes(
        self, path: str, attributes: Mapping[str, Any], left_out: Iterable[str], are_all_read: bool
    ) -> None:
        """What an object holds: where all are read, plain values count that no code names."""
        counted = []
        for name, value in list(attributes.items()):
            is_named = self._code.mentions(name)
            where = f"{path}.{name}".lstrip(".")
            if name in left_out or not (is_named or are_all_read):
                continue
            if self._add(where, value, is_named):
                counted.append(name)
                if is_named:
                    self.named.add(where)
        self._hold(operator.itemgetter, attributes, counted, is_growing=True)

    def _object(self, path: str, value: Any) -> None:
        if not isinstance(value, types.ModuleType):
            self._code.add([type(value)])
        left_out: Iterable[str] = ()
        if isinstance(value, torch.nn.Module):
            left_out = _NOT_OF_THE_FORWARD - _OF_OTHER_MODULES
        elif _is_config(path):
            left_out = _NOT_OF_THE_FORWARD | _WRITTEN_BY_SAVING
        if hasattr(value, "__dict__"):
            are_all_read = _is_config(path) or isinstance(value, torch.nn.Module)
            self._attributes(path, vars(value), left_out, are_all_read)
        slots = [
            name
            for kind in type(value).__mro__
            for name, member in vars(kind).items()
            if isinstance(member, types.MemberDescriptorType)
            and not is_known(kind.__module__)
            and self._code.mentions(name)
            and hasattr(value, name)
            and self._add(f"{path}.{name}", getattr(value, name), True)
        ]
        self._hold(operator.attrgetter, value, slots, is_growing=False)

    def _class(self, kind: type) -> None:
        """Methods, and of the user's own classes other attributes."""
        is_own = is_of_the_user(kind.__module__)
        counted = []
        for name, value in list(vars(kind).items()):
            if not self._code.mentions(name):
                continue
            counts = runs_functions(value) or (is_own and not is_special(name))
            path = f"{kind.__module__}.{kind.__qualname__}.{name}"
            if counts and self._add(path, value, True):
                self.named.add(path)
                counted.append(name)
        self._hold(operator.itemgetter, vars(kind), counted, is_growing=True)

    def _outside(self, function: types.FunctionType) -> None:
        """Closures and globals of the user's own functions."""
        if not is_of_the_user(function.__module__ or ""):
            return
        where = f"{function.__module__}.{function.__qualname__}"
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            values = _cell_values(cell)
            if name != "__class__" and self._add(f"{where}.{name}", values[0], True):
                self.holders.append(Holder(_cell_values, cell, values))
        names = [
            name
            for name in global_names(function)
            if self._add(f"{GLOBAL}{function.__module__}.{name}", function.__globals__[name], True)
        ]
        self._hold(operator.itemgetter, function.__globals__, names, is_growing=False)


def _cell_values(cell: types.CellType) -> tuple[Any]:
    return (bytecode.content(cell),)


def _is_container(value: Any) -> bool:
    """Whether entries are what they seem: a class of one's own may make them when asked."""
    return isinstance(value, _CONTAINERS) and any(
        type(value).__getitem__ is kind.__getitem__ for kind in _CONTAINERS
    )


def _array_value(array: np.ndarray[Any, Any]) -> tuple[str, tuple[int, ...], bytes]:
    return str(array.dtype), array.shape, array.tobytes()


def _is_config(path: str) -> bool:
    """transformers' and peft's configs, and others like them."""
    name = path.rpartition(".")[2]
    return name != "generation_config" and (name == "config" or name.endswith("_config"))
