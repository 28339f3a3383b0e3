"""Functions of ours that ATen nodes run without torch's dispatcher, which costs more than a small
product: tensors in, a tensor or a tuple of them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: By the operator's name.
_direct: dict[bytes, Callable[..., Any]] = {}
#: Which of their inputs are numbers.
_numbers: dict[bytes, frozenset[int]] = {}


def direct(name: str, numbers: Iterable[int] = ()) -> Callable[[_Function], _Function]:
    """Have ATen nodes whose operator has this name run the function.

    It takes tensors, None for an absent one, and returns a tensor or a tuple of them.

    Args:
        numbers: positions of the inputs that the function reads as numbers. They are on the CPU in
            a graph on a GPU, too, where each reading would wait for all that the GPU has to do.
    """

    def keep(function: _Function) -> _Function:
        _direct[name.encode()] = function
        _numbers[name.encode()] = frozenset(numbers)
        return function

    return keep


#: Makes such functions of names that begin alike: the function, and which inputs are numbers.
_families: dict[bytes, Callable[[str], tuple[Callable[..., Any], Iterable[int]]]] = {}


def direct_family(
    beginning: str, make: Callable[[str], tuple[Callable[..., Any], Iterable[int]]]
) -> None:
    """As :func:`direct`, for all operators whose names begin so.

    Args:
        make: of a name, the function and which of its inputs are numbers.
    """
    _families[beginning.encode()] = make


def find(name: bytes) -> Callable[..., Any] | None:
    """The function of an operator's name, or None where it is torch's."""
    function = _direct.get(name)
    if function is not None:
        return function
    for beginning, make in _families.items():
        if name.startswith(beginning):
            function, numbers = make(name.decode())
            return direct(name.decode(), numbers)(function)
    return None


def numbers_of(name: bytes) -> frozenset[int]:
    """Which inputs of such a function are numbers."""
    return _numbers[name]
