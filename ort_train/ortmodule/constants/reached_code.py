"""Which functions a forward can reach, and the names that they mention.

Nobody can tell what Python code will read, but what it names is a bound: an attribute that no
function mentions is read by none of them. Methods are reached by their names, whatever they are
called on; functions by closures, decorators, and, from the user's own code, by global names. Code
of torch and of Python's library is left alone, as are the globals of other libraries.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ort_train.ortmodule.cache import bytecode
from ort_train.ortmodule.cache.packages import is_known, is_of_the_user

#: Of the methods that Python calls without their names.
_NOT_OF_A_FORWARD = frozenset(
    """
    __init__ __new__ __post_init__ __init_subclass__ __repr__ __str__ __dir__ __del__ __copy__
    __deepcopy__ __getstate__ __setstate__ __reduce__ __reduce_ex__ __getnewargs__
    """.split()  # noqa: SIM905
)
_HOLDERS_OF_FUNCTIONS = (
    types.MethodType,
    staticmethod,
    classmethod,
    property,
    functools.partial,
    functools.cached_property,
)


class ReachedCode:
    """What can be reached from a module's parts.

    Attributes:
        names: that the functions mention.
        functions: in the order in which they were reached.
        classes: whose methods may be reached.
    """

    def __init__(self) -> None:
        self.names = {"forward"}
        self.functions: list[types.FunctionType] = []
        self.classes: list[type] = []
        self._met: set[Any] = set()

    def add(self, values: Iterable[Any]) -> None:
        """Follow functions and classes to all that they reach."""
        for value in values:
            self._add(value)
        num_functions = -1
        while num_functions != len(self.functions):  # more names may be those of more methods
            num_functions = len(self.functions)
            for kind in self.classes:
                for name, value in list(vars(kind).items()):
                    if self.mentions(name):
                        self._add(value)

    def mentions(self, name: str) -> bool:
        """Whether an attribute of this name may be read."""
        return name not in _NOT_OF_A_FORWARD if is_special(name) else name in self.names

    def _add(self, value: Any) -> None:
        if isinstance(value, type):
            if issubclass(value, torch.autograd.Function):
                return  # a graph runs it as it is, or refuses it (functions.py)
            for base in value.__mro__:
                if base not in self._met and not is_known(base.__module__):
                    self._met.add(base)
                    self.classes.append(base)
            return
        for function in functions_of(value):
            if function not in self._met and not is_known(function.__module__ or ""):
                self._met.add(function)
                self.functions.append(function)
                self.names.update(bytecode.names(function.__code__))
                self.names.update(bytecode.words(function.__code__))
                for cell in function.__closure__ or ():
                    self._add(bytecode.content(cell))
                for name in global_names(function):
                    self._add(function.__globals__[name])


def is_special(name: str) -> bool:
    """Whether Python calls a method of this name without that code names it."""
    return name.startswith("__") and name.endswith("__")


def runs_functions(value: Any) -> bool:
    """Whether :func:`functions_of` it are any."""
    return next(functions_of(value), None) is not None


def functions_of(value: Any) -> Iterator[types.FunctionType]:
    """The functions that a method, a property or a decorated function runs."""
    if isinstance(value, types.FunctionType):
        yield value
    if isinstance(value, (types.FunctionType, *_HOLDERS_OF_FUNCTIONS)):
        for name in ("__func__", "__wrapped__", "fget", "func"):
            yield from functions_of(getattr(value, name, None))


def global_names(function: types.FunctionType) -> Iterator[str]:
    """Of the globals that a function of the user's own reads."""
    if is_of_the_user(function.__module__ or ""):
        for name in bytecode.global_names(function.__code__):
            if name in function.__globals__:
                yield name
