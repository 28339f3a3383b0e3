"""A module's call and its result, split into tensors and what surrounds them.

A graph takes and returns flat tensors. What else a call carries (nesting, names, booleans, numbers,
None) is constant in one graph, and part of the key that picks the graph.
"""

from __future__ import annotations

import functools
import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ort_train.errors import UnsupportedModelError

_CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
#: Numbers that differ from batch to batch: as tensors they are inputs of one graph.
_NUMBERS_PER_BATCH = frozenset({"num_items_in_batch"})


@dataclass(frozen=True)
class CallSchema:
    """All of a call but its tensors' values; equal schemas share a graph.

    Attributes:
        spec: the nesting of (args, kwargs).
        names: name of each tensor, in order, made of its path in the call.
        tensors: (rank, dtype, device, requires_grad) of each tensor.
        constants: (position, value) of all leaves that are not tensors.
        constant_types: of each constant; 1, 1.0 and True are equal, but not the same argument.
    """

    spec: pytree.TreeSpec
    names: tuple[str, ...]
    tensors: tuple[tuple[int, torch.dtype, torch.device, bool], ...]
    constants: tuple[tuple[int, Any], ...]
    constant_types: tuple[type, ...]

    @functools.cached_property
    def _hash(self) -> int:  # TreeSpec's own hash walks its whole repr
        return hash((self.names, self.tensors, self.constants))

    def __hash__(self) -> int:
        return self._hash

    def rebuild(self, tensors: tuple[torch.Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the call with these tensors."""
        args, kwargs = pytree.tree_unflatten(merge(tensors, self.constants), self.spec)
        return args, kwargs


def merge(tensors: tuple[torch.Tensor, ...], constants: tuple[tuple[int, Any], ...]) -> list[Any]:
    """Leaves in order: constants at their positions, tensors in the gaps."""
    leaves: list[Any] = list(tensors)
    for position, value in constants:  # ascending, so each insertion finds its place
        leaves.insert(position, value)
    return leaves


def _path_name(path: tuple[Any, ...]) -> str:
    parts = []
    for entry in path[1:]:  # path[0] tells args from kwargs
        for attribute in ("key", "idx", "name"):
            if hasattr(entry, attribute):
                parts.append(str(getattr(entry, attribute)))
                break
    # Upstream writes the names into the source of a function.
    name = re.sub(r"\W", "_", "_".join(parts))
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"arg_{name}"


def _unused(name: str, names: list[str]) -> str:
    """The name, or with a number where another path spells the same."""
    unused, count = name, 1
    while unused in names:
        count += 1
        unused = f"{name}_{count}"
    return unused


def describe_call(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[CallSchema, tuple[torch.Tensor, ...]]:
    """The schema and the tensors of a call.

    Raises:
        UnsupportedModelError: for an argument that is neither tensor nor constant.
    """
    kwargs = dict(kwargs)
    for name in _NUMBERS_PER_BATCH & kwargs.keys():
        if isinstance(kwargs[name], int | float):
            kwargs[name] = torch.tensor(kwargs[name])
    leaves = (*args, *kwargs.values())
    kinds = [_kind(leaf) for leaf in leaves]
    if None in kinds:  # something nested, or nothing that a graph takes
        return _describe(args, kwargs)
    key = len(args), tuple(kwargs), tuple(kinds)
    schema = _flat_schemas.get(key)
    if schema is None:
        schema, tensors = _describe(args, kwargs)
        if len(_flat_schemas) < _MAX_FLAT_SCHEMAS:
            _flat_schemas[key] = schema
        return schema, tensors
    return schema, tuple([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])


#: Of calls without nesting, which are looked up instead of described anew at every step.
_flat_schemas: dict[Any, CallSchema] = {}
_MAX_FLAT_SCHEMAS = 256


def _kind(leaf: Any) -> tuple[Any, ...] | None:
    """What a schema knows of an argument; None for what isn't a tensor or a constant itself."""
    if isinstance(leaf, torch.Tensor):
        return leaf.dim(), leaf.dtype, leaf.device, leaf.requires_grad
    # The very types: others may be equal to a constant and be another argument.
    return (type(leaf), leaf) if type(leaf) in _CONSTANTS else None


def _describe(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[CallSchema, tuple[torch.Tensor, ...]]:
    leaves, spec = pytree.tree_flatten_with_path((args, kwargs))
    tensors: list[torch.Tensor] = []
    names: list[str] = []
    constants: list[tuple[int, Any]] = []
    for position, (path, leaf) in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
            names.append(_unused(_path_name(path), names))
        elif isinstance(leaf, _CONSTANTS):
            constants.append((position, leaf))
        else:
            raise UnsupportedModelError(
                f"argument {_path_name(path)!r} is a {type(leaf).__name__}: backend 'ort' passes "
                "tensors, numbers, strings and nests of them; leave the argument out in training "
                "(for a cache: use_cache=False) or train with backend='eager'"
            )
    schema = CallSchema(
        spec,
        tuple(names),
        tuple((t.dim(), t.dtype, t.device, t.requires_grad) for t in tensors),
        tuple(constants),
        tuple(type(value) for _, value in constants),
    )
    return schema, tuple(tensors)


def size_pattern(tensors: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
    """Which dimensions of a call are 1 (marked -1), and which are of equal size (one number each).

    What a trace takes for granted about sizes: it skips a broadcast over a batch of one, and the
    expansion of one tensor to another's size where both are equal.
    """
    return _size_pattern(tuple([tensor.shape for tensor in tensors]))


@functools.lru_cache(maxsize=256)
def _size_pattern(shapes: tuple[torch.Size, ...]) -> tuple[int, ...]:
    numbers: dict[int, int] = {1: -1}
    return tuple(numbers.setdefault(size, len(numbers)) for shape in shapes for size in shape)


def fits_pattern(tensors: tuple[torch.Tensor, ...], pattern: tuple[int, ...]) -> bool:
    """Whether what a trace took for granted holds for this call, too."""
    sizes: dict[int, int] = {-1: 1}
    dimensions = (size for t in tensors for size in t.shape)
    return all(
        sizes.setdefault(number, size) == size
        for number, size in zip(pattern, dimensions, strict=True)
    )


@dataclass(frozen=True)
class ResultSchema:
    """How a module's flat output tensors become its own output type again.

    Attributes:
        spec: the nesting.
        constants: (position, value) of all leaves that are not tensors.
        deferred: position and data type of the logits that a graph leaves out; None where it
            returns them.
    """

    spec: pytree.TreeSpec
    constants: tuple[tuple[int, Any], ...]
    deferred: tuple[int, torch.dtype] | None = None

    def rebuild(
        self,
        tensors: tuple[torch.Tensor, ...],
        make_deferred: Callable[[torch.dtype], Any] | None = None,
    ) -> Any:
        """The module's own output type (a ModelOutput, a tuple, a tensor, ...).

        Args:
            make_deferred: what stands for the logits that the graph leaves out.
        """
        constants = self.constants
        if self.deferred is not None:
            assert make_deferred is not None
            position, dtype = self.deferred
            constants = tuple(sorted([*constants, (position, make_deferred(dtype))], key=_position))
        return pytree.tree_unflatten(merge(tensors, constants), self.spec)


def _position(entry: tuple[int, Any]) -> int:
    return entry[0]


def describe_result(
    result: Any, without_logits: bool = False
) -> tuple[ResultSchema, tuple[torch.Tensor, ...]]:
    """The schema and the tensors of what a module returned.

    Args:
        without_logits: leave the logits out of the tensors.

    Raises:
        UnsupportedModelError: for an output that is neither tensor nor constant.
    """
    leaves, spec = pytree.tree_flatten(result)
    logits = logits_of(result) if without_logits else None
    tensors: list[torch.Tensor] = []
    constants: list[tuple[int, Any]] = []
    deferred = None
    for position, leaf in enumerate(leaves):
        if logits is not None and leaf is logits:
            deferred = (position, leaf.dtype)
        elif isinstance(leaf, torch.Tensor):
            tensors.append(leaf)
        elif isinstance(leaf, _CONSTANTS):
            constants.append((position, leaf))
        else:
            raise UnsupportedModelError(
                f"the module returns a {type(leaf).__name__}, which a graph can't: return tensors "
                "in tuples, dicts or a transformers ModelOutput, or train with backend='eager'"
            )
    return ResultSchema(spec, tuple(constants), deferred), tuple(tensors)


def logits_of(result: Any) -> Any:
    """The tensor `logits` of a result, or what follows the loss in a tuple, as transformers' do."""
    if isinstance(result, Mapping):
        logits = result.get("logits")
    else:
        is_with_loss = (
            isinstance(result, tuple)
            and len(result) > 1
            and isinstance(result[0], torch.Tensor)
            and result[0].dim() == 0
        )
        logits = result[1] if is_with_loss else None
    return logits if isinstance(logits, torch.Tensor) else None
