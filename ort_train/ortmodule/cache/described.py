"""Python objects as digests that are equal in two processes only where code and values are.

A trace runs Python: what it records follows from the code that it runs through and from the values
that this code reads. Neither is told by the names of classes: a notebook changes a class, a library
replaces a function of another one. So functions are described by their bytecode and by what it
refers to: closures, defaults, and the globals that it names, in turn.

Code of the user's own is followed wholly, and every value that it refers to has to be understood.
transformers and peft are followed from function to function, so that whatever was put in another's
place shows; the values of their own globals (loggers, registries of other models) are taken to be
as their version has them. torch and Python's library are known by their versions, and by the
bytecode of what is referred to.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import re
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ort_train.ortmodule.cache import bytecode
from ort_train.ortmodule.cache.packages import (
    FOLLOWED,
    KNOWN,
    PURE,
    is_installed,
    is_known,
    package,
)


class UndescribableError(Exception):
    """A value that can't be told from others; the message says where and why."""


_PLAIN = (type(None), type(...), type(NotImplemented), bool, int, float, complex, str, bytes)
_TORCH_VALUES = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_BUILTINS = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.ClassMethodDescriptorType,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)
#: What every class has, and no code depends on.
_UNREAD = frozenset(
    """
    __abstractmethods__ __annotate_func__ __annotations__ __dict__ __doc__ __firstlineno__
    __module__ __orig_bases__ __parameters__ __qualname__ __static_attributes__ __type_params__
    __weakref__ _abc_impl
    """.split()  # noqa: SIM905
)
#: Made anew in every process: transformers' hash of a GenerationConfig's own values, and its
#: number of the process for the hub's requests.
_PER_PROCESS = frozenset({"_original_object_hash", "SESSION_ID"})


class Description:
    """A digest that objects are added to, each once.

    What refers to an object that was met before names it by its number, so the order in which
    objects are met is part of the digest.

    Args:
        own: packages that are followed wholly although they are installed.
    """

    def __init__(self, own: Iterable[str] = ()) -> None:
        self._own = frozenset(own) - KNOWN - FOLLOWED - sys.stdlib_module_names
        self._hash = hashlib.sha256()
        self._numbers: dict[int, str] = {}
        self._kept: list[Any] = []  # an id is an object's own only while it lives
        self._queue: deque[Callable[[], None]] = deque()
        self._members: set[tuple[int, str]] = set()

    def name(self, value: Any, label: str) -> None:
        """Refer to this very object by a label from now on."""
        self._numbers[id(value)] = label
        self._kept.append(value)

    def knows(self, value: Any) -> bool:
        """Whether this very object has a label."""
        return id(value) in self._numbers

    def add(self, label: str, value: Any) -> None:
        """Add a value that has to be understood.

        Raises:
            UndescribableError: where it, or what it refers to, isn't.
        """
        self._feed(label, self._token(value, label, True))
        while self._queue:
            self._queue.popleft()()

    def hexdigest(self) -> str:
        """The digest of all that was added."""
        return self._hash.hexdigest()

    def _feed(self, *parts: str) -> None:
        for part in parts:
            data = part.encode("utf-8", "surrogatepass")
            self._hash.update(len(data).to_bytes(8, "little") + data)

    def _number(self, value: Any) -> tuple[str, bool]:
        """What an object is referred to by, and whether it is met for the first time."""
        known = self._numbers.get(id(value))
        if known is not None:
            return known, False
        self.name(value, f"#{len(self._kept)}")
        return self._numbers[id(value)], True

    def _is_known(self, module: str) -> bool:
        """Whether a module is known by its version."""
        top = package(module)
        if top in self._own or top in FOLLOWED:
            return False
        return is_known(module) or is_installed(top)

    # --- values

    def _token(self, value: Any, where: str, strict: bool) -> str:
        """A value in words; what it refers to is queued."""
        kind = type(value)
        if kind in _PLAIN:
            return f"{kind.__name__} {value!r}"
        if id(value) in self._numbers:
            return self._numbers[id(value)]
        if isinstance(value, _TORCH_VALUES):
            return str(value)
        if isinstance(value, enum.Enum):
            return f"{kind.__module__}.{kind.__qualname__}.{value.name}"
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value, where)
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, types.MethodType):
            return self._parts("method", (value.__self__, value.__func__), where, strict)
        if isinstance(value, functools.partial):
            return self._parts("partial", (value.func, value.args, value.keywords), where, strict)
        if isinstance(value, _BUILTINS):
            return f"{kind.__name__} {getattr(value, '__qualname__', None) or value!s}"
        wrapped = getattr(value, "__wrapped__", None) if callable(value) else None
        if isinstance(wrapped, types.FunctionType) and self._is_known(kind.__module__):
            return f"{kind.__qualname__} of {self._function(wrapped)}"  # lru_cache
        if isinstance(value, staticmethod | classmethod):
            return self._parts(kind.__name__, (value.__func__,), where, strict)
        if isinstance(value, property):
            return self._parts("property", (value.fget, value.fset), where, strict)
        if isinstance(value, functools.cached_property):
            return self._parts("cached_property", (value.func,), where, strict)
        return self._compound(value, where, strict)

    def _parts(self, kind: str, parts: tuple[Any, ...], where: str, strict: bool) -> str:
        return " ".join([kind, *(self._token(part, where, strict) for part in parts)])

    def _compound(self, value: Any, where: str, strict: bool) -> str:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        # Whether equal ones of these are one object is the interpreter's whim.
        if kind in (tuple, frozenset):
            return self._items(value, name, where, strict)
        number, is_new = self._number(value)
        assert is_new
        if isinstance(value, torch.Tensor):
            return f"{number} = {tensor_token(value, where)}"
        if isinstance(value, dict | types.MappingProxyType):
            items = [
                f"{self._token(k, where, strict)}: {self._token(v, f'{where}[{k!r}]', strict)}"
                for k, v in _entries(value)
            ]
            inner = "{" + ", ".join(items) + "}"
            if kind in (dict, OrderedDict, types.MappingProxyType):
                return f"{number} = {name} {inner}"
            if isinstance(value, defaultdict):
                factory = self._token(value.default_factory, where, strict)
                return f"{number} = {name} {inner} {factory}"
            return f"{number} = {inner} {self._instance(value, where, strict)}"
        if isinstance(value, range | slice | torch.Size):
            return f"{name} {value!r}"
        if kind in (list, set, deque) or (isinstance(value, tuple) and hasattr(kind, "_fields")):
            return f"{number} = {self._items(value, name, where, strict)}"
        if isinstance(value, re.Pattern):
            return f"{name} {value.pattern!r} {value.flags}"
        if isinstance(value, logging.Logger | logging.LoggerAdapter):
            return name
        return f"{number} = {self._instance(value, where, strict)}"

    def _items(self, value: Iterable[Any], name: str, where: str, strict: bool) -> str:
        items = [self._token(each, where, strict) for each in value]
        if isinstance(value, set | frozenset):
            if any("#" in item for item in items):  # numbered in the order of this process
                return self._unknown(value, where, strict, "a set of more than plain values")
            items.sort()
        return f"{name} [{', '.join(items)}]"

    def _instance(self, value: Any, where: str, strict: bool) -> str:
        """An object of a class written in Python, by its attributes."""
        kind = type(value)
        if not strict or not hasattr(value, "__dict__") or _is_native(kind):
            return self._unknown(value, where, strict, f"a {kind.__module__}.{kind.__qualname__}")
        attributes = vars(value)
        items = [
            f"{name!r}: {self._token(each, f'{where}.{name}', strict)}"
            for name, each in attributes.items()
            if name not in _PER_PROCESS
        ]
        return f"{self._class(kind, where)} {{{', '.join(items)}}}"

    def _unknown(self, value: Any, where: str, strict: bool, what: str) -> str:
        if strict:
            raise UndescribableError(f"{where} is {what}, whose value can't be told")
        return f"some {type(value).__module__}.{type(value).__qualname__}"

    # --- code

    def _class(self, kind: type, where: str) -> str:
        number, is_new = self._number(kind)
        if is_new:
            self._queue.append(lambda: self._describe_class(kind, number, where))
        return number

    def _describe_class(self, kind: type, number: str, where: str) -> None:
        name = f"{kind.__module__}.{kind.__qualname__}"
        bases = [self._class(base, where) for base in kind.__mro__[1:]]
        self._feed(number, name, *bases)
        is_known = self._is_known(kind.__module__)
        strict = not is_known and package(kind.__module__) not in FOLLOWED
        for key, value in list(kind.__dict__.items()):
            if key in _UNREAD:
                continue
            if is_known and not _has_code(value):
                continue
            path = f"{kind.__qualname__}.{key}"
            if not strict and not _has_code(value):
                self._feed(key, self._global(value, path, False))
            else:
                self._feed(key, self._token(value, path, strict))

    def _function(self, function: types.FunctionType) -> str:
        number, is_new = self._number(function)
        if is_new:
            self._queue.append(lambda: self._describe_function(function, number))
        return number

    def _describe_function(self, function: types.FunctionType, number: str) -> None:
        code, scope = function.__code__, function.__globals__
        module = str(scope.get("__name__"))
        name = f"{module}.{code.co_qualname}" if sys.version_info >= (3, 11) else code.co_name
        is_known = self._is_known(module)
        strict = not is_known and package(module) not in FOLLOWED
        self._feed(number, name, *bytecode.tokens(code))
        path = f"{name}'s"
        for label, values in (
            ("defaults", function.__defaults__ or ()),
            ("keyword defaults", tuple((function.__kwdefaults__ or {}).values())),
            ("closure", tuple(map(bytecode.content, function.__closure__ or ()))),
        ):
            for value in values:
                self._feed(label, self._global(value, f"{path} {label}", strict))
        if is_known:
            return
        names = bytecode.names(code)
        # Attributes may have the name of a global that isn't meant, and can't be understood.
        for each in bytecode.global_names(code) if strict else names:
            if each not in scope or each in _PER_PROCESS:
                continue
            value = scope[each]
            if isinstance(value, types.ModuleType):
                self._module(value, names, f"{path} {each}", strict)
            else:
                self._feed(each, self._global(value, f"{path} global {each!r}", strict))

    def _global(self, value: Any, where: str, strict: bool) -> str:
        """What code refers to: of a library only code, plain values and tables of them."""
        if strict or isinstance(value, _PLAIN) or _has_code(value):
            return self._token(value, where, strict)
        if isinstance(value, dict):
            items = [
                f"{key!r}: {self._global(each, where, False) if _is_told(each) else '?'}"
                for key, each in _entries(value)
                if isinstance(key, str)
            ]
            return "{" + ", ".join(items) + "}"
        if isinstance(value, tuple | list) and all(map(_is_told, value)):
            return repr([self._global(each, where, False) for each in value])
        kind = type(value)
        name = f"some {kind.__module__}.{kind.__qualname__}"
        if package(kind.__module__) not in FOLLOWED or isinstance(value, dict):
            return name
        # A registry, such as transformers' of attention functions.
        tables = [v for v in getattr(value, "__dict__", {}).values() if isinstance(v, dict)]
        return (
            f"{name} {self._class(kind, where)} {[self._global(t, where, False) for t in tables]}"
        )

    def _module(
        self, module: types.ModuleType, names: tuple[str, ...], where: str, strict: bool
    ) -> None:
        """The members of a module that code names, and of modules within it."""
        if strict and package(module.__name__) in sys.stdlib_module_names - PURE:
            raise UndescribableError(
                f"{where} is Python's {module.__name__}, whose results differ from run to run"
            )
        version = vars(module).get("__version__")
        self._feed("module", module.__name__, str(version) if isinstance(version, str) else "")
        seen, inner = {id(module)}, [module]
        while inner:
            each = inner.pop()
            is_known = self._is_known(each.__name__)
            # Of torch.ops there is what was asked for before.
            for name in () if each.__name__.startswith("torch.ops") else names:
                value = vars(each).get(name)
                if isinstance(value, types.ModuleType):
                    if id(value) not in seen:
                        seen.add(id(value))
                        inner.append(value)
                    continue
                if (id(each), name) in self._members or name not in vars(each):
                    continue
                self._members.add((id(each), name))
                if not is_known or _has_code(value):
                    path = f"{where}'s {each.__name__}.{name}"
                    self._feed(name, self._global(value, path, strict and not is_known))


def _entries(mapping: Any) -> list[tuple[Any, Any]]:
    """What lies in a dict, without the code of one that loads on demand."""
    if isinstance(mapping, dict):
        return list(dict.items(mapping))
    return list(mapping.items())


def _has_code(value: Any) -> bool:
    kinds = (types.FunctionType, type, staticmethod, classmethod, property, types.MethodType)
    return isinstance(value, kinds) or isinstance(getattr(value, "__wrapped__", None), kinds[0])


def _is_told(value: Any) -> bool:
    return isinstance(value, _PLAIN) or _has_code(value)


def _is_native(kind: type) -> bool:
    """Whether a class, or a base of it but dict, keeps values outside of an object's `__dict__`."""
    is_heap_type = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, mostly
    return any(
        (base not in (object, dict) and not base.__flags__ & is_heap_type)
        or any(isinstance(each, types.MemberDescriptorType) for each in vars(base).values())
        for base in kind.__mro__
    )


def tensor_token(tensor: torch.Tensor, where: str) -> str:
    """A tensor by its values.

    Raises:
        UndescribableError: where it has none in memory, or is of another class than torch's own.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise UndescribableError(f"{where} is a {type(tensor).__qualname__}, not a plain tensor")
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
        raise UndescribableError(f"{where} is a tensor on {tensor.device}, {tensor.layout}")
    return f"{tensor_kind(tensor)} {digest(tensor)}"


def digest(tensor: torch.Tensor) -> str:
    """Of a dense tensor's values."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(values).hexdigest()


def tensor_kind(tensor: torch.Tensor) -> str:
    """What a graph knows of an input: all but its values."""
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device.type} {tensor.requires_grad}"
