"""Whether the values that a forward may read have changed since its graph was built.

They are looked at before every step, so where everything lies (walk.py) is kept in flat lists and
compared in loops that run in C. Only what these can't tell from a change is looked at again, path
by path. What the forward itself writes doesn't count.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ort_train.ortmodule.constants.known_tensor import KnownTensor
from ort_train.ortmodule.constants.reached_code import ReachedCode
from ort_train.ortmodule.constants.walk import GLOBAL, Walk

_GONE = object()


class ReadValues:
    """What a module's forward may read, as it was.

    Args:
        module: whose parts are walked through.
        forward: the module's own.
    """

    def __init__(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        self._module = module
        self._forward = forward
        self._code = ReachedCode()
        self._left_out: set[str] = set()
        self._known: dict[str, Any] = {}
        self._take(self._walk())

    def forget_changed(self) -> None:
        """Leave out, from now on, what isn't what it was: the forward itself writes it."""
        self._left_out.update(self._differing(self._walk()))
        self._take(self._walk())

    def changed(self) -> str | None:
        """One that isn't what it was, in words, or None."""
        if self._quick.is_untouched():
            return None
        walk = self._walk()
        for path in self._differing(walk):
            is_global = path.startswith(GLOBAL)
            return f"global {path.removeprefix(GLOBAL)!r}" if is_global else f"attribute {path!r}"
        if new := walk.leaves.keys() - self._known.keys():
            self._left_out |= new
            walk = self._walk()
        self._take(walk)
        return None

    def _walk(self) -> Walk:
        return Walk(self._module, self._forward, self._code, self._left_out)

    def _take(self, walk: Walk) -> None:
        before = self._known
        self._known = {path: _known(leaf, before.get(path)) for path, leaf in walk.leaves.items()}
        self._quick = _Quick(walk, self._known)

    def _differing(self, walk: Walk) -> Iterator[str]:
        """Paths of what is another, is gone, or is new and named by code."""
        for path, known in self._known.items():
            if not _is_same(walk.leaves.get(path, _GONE), known):
                yield path
        yield from (path for path in walk.leaves if path in walk.named and path not in self._known)


class _Quick:
    """What a walk found, and whether anything may have changed since."""

    def __init__(self, walk: Walk, known: dict[str, Any]) -> None:
        self._holders = [(take, held) for take, held, _ in walk.holders]
        self._values = [value for holder in walk.holders for value in holder.values]
        self._sized = walk.sized
        self._sizes = list(map(len, walk.sized))
        self._tensors = [(tensor, known[path]) for path, tensor in walk.tensors]
        self._compared = [(value_of, held, value_of(held)) for value_of, held in walk.compared]

    def is_untouched(self) -> bool:
        """False for some that are unchanged, too."""
        try:
            found = [take(held) for take, held in self._holders]
        except (AttributeError, IndexError, KeyError, ValueError):
            return False
        return (
            all(map(operator.is_, itertools.chain.from_iterable(found), self._values))
            and list(map(len, self._sized)) == self._sizes
            and all(known.is_untouched(tensor) for tensor, known in self._tensors)
            and all(value_of(held) == value for value_of, held, value in self._compared)
        )


def _known(leaf: Any, before: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    is_known = isinstance(before, KnownTensor) and before.is_untouched(leaf)
    return before if is_known else KnownTensor.of(leaf)


def _is_same(found: Any, known: Any) -> bool:
    if isinstance(known, KnownTensor):
        return isinstance(found, torch.Tensor) and known.is_same(found)
    if found is known:
        return True
    if type(found) is not type(known):  # which tells 1 from True
        return False
    if isinstance(known, float | complex | np.generic):
        return repr(found) == repr(known)  # NaN is NaN
    return bool(found == known)
