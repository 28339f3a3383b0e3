"""What a graph depends on in a module, but values: its parts, and what kind each parameter is.

It is looked at before every step, and hardly ever changes. By then the last step's numbers have
taken the place of modules in the processor's cache, and each of Python's steps through their tree
is slow. So what was found is kept in flat lists, and compared in loops that run in C.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

#: Numbers and switches of modules that a trace makes constant and that users change in training.
_TRACED_ATTRIBUTES = ("p", "dropout", "attention_dropout", "gradient_checkpointing")
_CONTAINERS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")

_flag_and_containers = operator.itemgetter("training", *_CONTAINERS)
_values = operator.methodcaller("values")
_kind = operator.attrgetter("requires_grad", "dtype", "shape")


class ModuleState(NamedTuple):
    """A module as it was found; the same object as long as nothing of it has changed.

    Attributes:
        key: equal for states that share graphs.
        parameters: of the module, in order.
        parameter_ids: their ids.
        buffers: of the module by name, persistent or not.
        is_trained: whether a parameter requires a gradient.
    """

    key: int
    parameters: tuple[torch.nn.Parameter, ...]
    parameter_ids: tuple[int, ...]
    buffers: dict[str, torch.Tensor]
    is_trained: bool


class StateReader:
    """Reads a module's state, step by step.

    Args:
        module: whose parts are looked at.
    """

    def __init__(self, module: torch.nn.Module):
        self._module = module
        self._keys: dict[Any, int] = {}
        self._state: ModuleState | None = None
        self._snapshot = _Snapshot(())

    def __call__(self) -> ModuleState:
        """The module's state now."""
        if self._state is None or not self._snapshot.is_untouched():
            self._state = self._read()
        return self._state

    def _read(self) -> ModuleState:
        module = self._module
        parts = tuple(module.modules())
        parameters = tuple(module.parameters())
        self._snapshot = _Snapshot(parts, parameters)
        attributes = tuple(_traced_attributes(part, part is module) for part in parts)
        key = (tuple(map(_kind, parameters)), attributes)
        return ModuleState(
            self._keys.setdefault(key, len(self._keys)),
            parameters,
            tuple(map(id, parameters)),
            dict(module.named_buffers()),
            any(parameter.requires_grad for parameter in parameters),
        )


class _Snapshot:
    """Everything that a state is read from."""

    def __init__(
        self,
        parts: tuple[torch.nn.Module, ...],
        parameters: tuple[torch.nn.Parameter, ...] = (),
    ):
        self._parts = parts
        self._parameters = parameters
        self._own: list[Any] = []
        with contextlib.suppress(KeyError):  # of a ScriptModule, which is read anew at every step
            self._own = self._read_own()
        containers = [found for found in self._own if isinstance(found, dict)]
        self._filled = [container for container in containers if container]
        self._empty = [container for container in containers if not container]
        self._sizes = list(map(len, self._filled))
        self._contents = list(self._read_contents())
        self._kinds = list(map(_kind, parameters))

    def is_untouched(self) -> bool:
        """Quick, and false for some that are unchanged."""
        try:
            own = self._read_own()
        except KeyError:
            return False
        return (
            all(map(operator.is_, own, self._own))
            and not any(self._empty)
            and list(map(len, self._filled)) == self._sizes
            and all(map(operator.is_, self._read_contents(), self._contents))
            and list(map(_kind, self._parameters)) == self._kinds
        )

    def _read_own(self) -> list[Any]:
        """Of each part, what it says of itself, and its containers."""
        attributes: list[dict[str, Any]] = list(map(vars, self._parts))
        found = list(itertools.chain.from_iterable(map(_flag_and_containers, attributes)))
        for name in _TRACED_ATTRIBUTES:
            found += map(dict.get, attributes, itertools.repeat(name))
        return found

    def _read_contents(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(_values, self._filled))


def _traced_attributes(part: torch.nn.Module, is_whole: bool) -> tuple[Any, ...]:
    attributes = part.__dict__
    # Those of the whole module are called around the graph.
    hooks = () if is_whole else forward_hooks(part)
    return (
        part.training,
        *(attributes.get(name) for name in _TRACED_ATTRIBUTES),
        *map(id, hooks),
    )


def forward_hooks(part: torch.nn.Module) -> Iterator[Any]:
    """The hooks around a module's forward."""
    yield from part._forward_hooks.values()
    yield from part._forward_pre_hooks.values()
