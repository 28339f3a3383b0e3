"""What a graph holds as constants, and whether the module still says the same.

Parameters and persistent buffers are inputs of a graph. Everything else that a forward reads is
constant in it: non-persistent buffers, and the numbers, words and tensors that are plain attributes
of modules and their configs. A graph whose constants have changed is built anew.

Not seen are attributes that the forward itself writes, attributes that came after the graph, and
what lies deeper than one list or dictionary of numbers: in objects of the user's own, in closures,
in global variables.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

_PLAIN = (int, float, bool, str, type(None), torch.dtype)
#: Containers with more entries are no settings, but tables.
_MAX_ENTRIES = 32
_GONE = object()
#: torch's own of every module (`training` is in a graph's key), and transformers' that change in
#: training and change no number: a training graph never has a cache.
_NOT_OF_THE_FORWARD = frozenset((*torch.nn.Module().__dict__, "use_cache", "warnings_issued"))
#: Of configs: what transformers' save_pretrained writes. Types of parameters are in a graph's key.
_WRITTEN_BY_SAVING = frozenset(
    ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
)


class KnownTensor(NamedTuple):
    """What a tensor was when it was last looked at."""

    address: int
    version: int
    value: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> KnownTensor:
        return cls(tensor.data_ptr(), tensor._version, tensor.detach().clone())

    def is_untouched(self, tensor: torch.Tensor) -> bool:
        """Quick, and false for some that are unchanged."""
        return tensor.data_ptr() == self.address and tensor._version == self.version


def same_values(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    """Whether a tensor is as expected, to the bit; NaN is NaN."""
    if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    equal = (found == expected) | ((found != found) & (expected != expected))
    return bool(equal.all())


class Constants:
    """What a module's graph holds as constants.

    Args:
        attributes: of the module, as they were before it was traced.
        buffers: by name, those that the exporter made constants of: non-persistent ones.
    """

    def __init__(self, attributes: PlainAttributes, buffers: Mapping[str, torch.Tensor]) -> None:
        attributes.forget_changed()
        self._attributes = attributes
        self._buffers = {name: KnownTensor.of(buffer) for name, buffer in buffers.items()}

    def changed(self, buffers: Mapping[str, torch.Tensor]) -> str | None:
        """What isn't what it was, in words, or None.

        Args:
            buffers: all of the module's now, by name.
        """
        if (name := self._changed_buffer(buffers)) is not None:
            return f"non-persistent buffer {name!r}"
        if (name := self._attributes.changed()) is not None:
            return f"attribute {name!r}"
        return None

    def _changed_buffer(self, buffers: Mapping[str, torch.Tensor]) -> str | None:
        for name, known in self._buffers.items():
            buffer = buffers.get(name)
            if buffer is None or known.is_untouched(buffer):
                continue
            if not same_values(buffer, known.value):
                return name
            # Written to, with the same values (DistributedDataParallel does so every step).
            self._buffers[name] = KnownTensor.of(buffer)
        return None


class PlainAttributes:
    """The plain attributes of a module's parts and configs, as they were."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._owners = [_Owner(*attributes) for attributes in _attributes_of(module)]
        self._index()

    def _index(self) -> None:
        """Of all owners, for a look at every step: one loop, in C as far as can be."""
        self._getters = [(owner.get, owner.attributes) for owner in self._owners]
        self._values = [value for owner in self._owners for value in owner.values]
        self._others = [
            (owner.attributes, name, owner.known[name])
            for owner in self._owners
            for name in owner.others
        ]

    def forget_changed(self) -> None:
        """Leave out, from now on, what isn't what it was: the forward itself writes it."""
        for owner in self._owners:
            owner.forget_changed()
        self._index()

    def changed(self) -> str | None:
        """The path of one that isn't what it was, or None."""
        if self._is_untouched():
            return None
        for owner in self._owners:
            if (name := owner.changed()) is not None:
                return f"{owner.path}.{name}".lstrip(".")
        self._index()
        return None

    def _is_untouched(self) -> bool:
        """Quick, and false for some that are unchanged."""
        try:
            found = [get(attributes) for get, attributes in self._getters]
        except KeyError:
            return False
        if not all(map(operator.is_, itertools.chain.from_iterable(found), self._values)):
            return False
        for attributes, name, known in self._others:
            if not _is_same(attributes.get(name), known):
                return False
        return True


class _Owner:
    """A module's or config's own attributes.

    Attributes:
        path: of the owner, from the module.
        attributes: its `__dict__`.
        known: those that count, as they were.
        others: names of those that aren't numbers, words or the like.
        get: takes all others of the known from `attributes`, as a tuple.
        values: what it took.
    """

    def __init__(self, path: str, attributes: dict[str, Any], left_out: frozenset[str]) -> None:
        self.path = path
        self.attributes = attributes
        self.known = {
            name: _snapshot(value)
            for name, value in attributes.items()
            if name not in left_out and _is_setting(value)
        }
        self._index()

    def _index(self) -> None:
        values = {name: self.attributes.get(name) for name in self.known}
        plain = [name for name, value in values.items() if type(value) in _PLAIN]
        self.others = [name for name in values if name not in plain]
        # Two names at least, for itemgetter to return a tuple.
        self.get = operator.itemgetter(*plain, *plain[:1]) if plain else _nothing
        self.values: tuple[Any, ...] = self.get(self.attributes)

    def changed(self) -> str | None:
        """The name of one that isn't what it was, or None."""
        for name, known in self.known.items():
            if not _is_same(self.attributes.get(name, _GONE), known):
                return name
        self.known = {name: _snapshot(self.attributes[name]) for name in self.known}
        self._index()
        return None

    def forget_changed(self) -> None:
        """Leave out, from now on, what isn't what it was."""
        self.known = {
            name: known
            for name, known in self.known.items()
            if _is_same(self.attributes.get(name, _GONE), known)
        }
        self._index()


def _nothing(attributes: dict[str, Any]) -> tuple[Any, ...]:
    return ()


def _attributes_of(
    module: torch.nn.Module,
) -> Iterator[tuple[str, dict[str, Any], frozenset[str]]]:
    """Path, attributes, and names of those that don't count, of each part and each config."""
    seen: set[int] = set()
    for path, part in module.named_modules():
        yield path, part.__dict__, _NOT_OF_THE_FORWARD
        for name, value in list(part.__dict__.items()):
            # transformers' and peft's configs, and others like them.
            is_config = name == "config" or name.endswith("_config")
            if (
                is_config
                and name != "generation_config"
                and hasattr(value, "__dict__")
                and id(value) not in seen
            ):
                seen.add(id(value))
                left_out = _NOT_OF_THE_FORWARD | _WRITTEN_BY_SAVING
                yield f"{path}.{name}".lstrip("."), value.__dict__, left_out


def _is_setting(value: Any) -> bool:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        return len(value) <= _MAX_ENTRIES and all(type(each) in _PLAIN for each in value)
    return type(value) in _PLAIN or isinstance(value, torch.Tensor)


def _snapshot(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return KnownTensor.of(value)
    return copy.copy(value) if isinstance(value, dict | list) else value


def _is_same(found: Any, known: Any) -> bool:
    if isinstance(known, KnownTensor):
        return isinstance(found, torch.Tensor) and (
            known.is_untouched(found) or same_values(found, known.value)
        )
    if found is known:
        return True
    if type(found) is not type(known):
        return False
    if isinstance(known, dict | list) and len(found) == len(known):
        entries: Iterator[bool] = map(operator.is_, found, known)
        if isinstance(known, dict):
            entries = itertools.chain(entries, map(operator.is_, found.values(), known.values()))
        if all(entries):
            return True
    return repr(found) == repr(known)  # which tells 1 from True, and takes NaN for NaN
