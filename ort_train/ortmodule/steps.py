"""Runs the arithmetic on sizes that a trace kept: each operator once for equal arguments.

A model's layers ask for the same sizes over and over. Equal values have one number here, and an
operator's result is looked up by the numbers of its arguments, so that what a new combination of
sizes costs hardly grows with the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ort_train.ortmodule import sizes
from ort_train.ortmodule.kernels.torch_operators import called, overload_of

#: Entries of a tensor up to which it is compared with others by its numbers.
_MAX_COMPARED = 64
_COMPARED = bool | int | float | str | torch.device | None


@dataclass(frozen=True)
class Step:
    """One operator.

    Attributes:
        operator: its name and overload, "aten::size.int".
        inputs: the places of its arguments among the program's values.
        outputs: those of its results.
        is_exact: whether its results' numbers, and not their sizes alone, are asked for.
    """

    operator: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    is_exact: bool


class Values:
    """The values of a program, by their places in it."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._values: list[Any] = []
        self._equal: dict[Hashable, int] = {}
        self._results: dict[Hashable, tuple[int, ...]] = {}

    def copy(self) -> Values:
        """The same values, which others can be added to."""
        other = Values()
        other._numbers = self._numbers.copy()
        other._values = self._values.copy()
        other._equal = self._equal.copy()
        return other

    def __getitem__(self, place: int) -> Any:
        return self._values[self._numbers[place]]

    def put(self, place: int, value: Any) -> None:
        """A value that no step computes."""
        self._numbers[place] = self._number(value)

    def run(self, step: Step) -> None:
        """Compute a step's results, or take those of a step like it.

        Raises:
            Exception: of any kind, where the operator can't run on such sizes.
        """
        numbers = self._numbers
        inputs = [numbers[place] for place in step.inputs]
        key = (step.operator, step.is_exact, *inputs)
        results = self._results.get(key)
        if results is None:
            values = _run(step, [self._values[number] for number in inputs])
            results = tuple(map(self._number, values))
            if not (step.is_exact and _draws(step.operator)):
                self._results[key] = results
        for place, number in zip(step.outputs, results, strict=True):
            numbers[place] = number

    def _number(self, value: Any) -> int:
        content = _content(value)
        if content is None:
            self._values.append(value)
            return len(self._values) - 1
        number = self._equal.setdefault(content, len(self._values))
        if number == len(self._values):
            self._values.append(value)
        return number


def _content(value: Any) -> Hashable | None:
    """What equal values have in common; None for one that is compared with no other."""
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            return "meta", value.dtype, value.shape, value.stride()
        if value.numel() > _MAX_COMPARED:
            return None
        return value.dtype, value.shape, tuple(value.reshape(-1).tolist())
    if isinstance(value, list | tuple):
        contents = [_content(item) for item in value]
        return None if None in contents else (type(value), *contents)
    return (type(value), value) if isinstance(value, _COMPARED) else None


_CONVERSIONS: dict[str, Callable[..., Any]] = {
    "prim::NumToTensor": torch.tensor,
    "prim::ListConstruct": lambda *items: list(items),
    "prim::TupleConstruct": lambda *items: items,
    "prim::ListUnpack": lambda items: items,
    "prim::TupleUnpack": lambda items: items,
    "aten::Int": int,
    "aten::IntImplicit": int,
    "aten::Float": float,
    "aten::FloatImplicit": float,
    "aten::Bool": bool,
    "aten::ScalarImplicit": lambda value: value.item(),
    # Which torch 2.8 has for real devices only; the flags behind the first nine say how it runs.
    "aten::_convolution": lambda *arguments: torch.ops.aten.convolution.default(*arguments[:9]),
}


def _draws(operator: str) -> bool:
    """Whether two calls with the same arguments give other numbers."""
    if operator.split(".")[0] in _CONVERSIONS:
        return False
    return torch.Tag.nondeterministic_seeded in overload_of(operator).tags


def _run(step: Step, arguments: list[Any]) -> Iterable[Any]:
    """The step's results, in order."""
    name = step.operator.split(".")[0]
    if name in _CONVERSIONS:
        result = _CONVERSIONS[name](*arguments)
    else:
        if name.endswith("_") and not name.endswith("__"):  # other places share what it writes to
            arguments[0] = arguments[0].clone()
        result = _call(step.operator, arguments, step.is_exact)
    return result if len(step.outputs) > 1 or name in _UNPACKING else (result,)


_UNPACKING = frozenset({"prim::ListUnpack", "prim::TupleUnpack"})


def _call(operator: str, arguments: list[Any], is_exact: bool) -> Any:
    """The operator's result: of numbers where they are asked for and known, of sizes otherwise."""
    is_meta = not is_exact or any(tensor.is_meta for tensor in _tensors(arguments))
    device = torch.device("meta" if is_meta else "cpu")

    def placed(value: Any) -> Any:
        if isinstance(value, torch.device):
            return device
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.to(device)
        if isinstance(value, list):
            return [placed(item) for item in value]
        return value

    arguments = list(map(placed, arguments))
    if not is_exact and (result := sizes.result(operator, arguments)) is not None:
        return result
    return called(operator, arguments)


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
