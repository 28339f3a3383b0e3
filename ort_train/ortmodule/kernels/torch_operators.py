"""Any operator of torch as a node of ONNX Runtime's graph, differentiated by torch's autograd.

The node's name says which operator it is and all arguments that are no inputs, as JSON, so a graph
from the cache needs nothing else. Its gradient is a node, too, which runs the operator again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ort_train.ortmodule.kernels.direct import direct_family

_FORWARD, _BACKWARD = "torch ", "gradient of torch "


@dataclass(frozen=True)
class Call:
    """An operator, and what it is called with.

    Attributes:
        operator: its name and overload, "aten::elu" or "aten::amax.default".
        arguments: JSON values in the operator's order, {"input": i} in place of what is an input of
            the node, and lists of either.
        numbers: which inputs are numbers rather than tensors.
        masks: which inputs are booleans, whom ONNX Runtime hands on as numbers of eight bits.
        trained: which inputs have a gradient.
        output: which result's gradient is known, as the others' are integers; None if none has one.
        results: of each, its onnx.TensorProto.DataType and its sizes: 1, or None for another.
    """

    operator: str
    arguments: list[Any]
    numbers: list[int]
    masks: list[int]
    trained: list[int]
    output: int | None
    results: list[tuple[int, list[int | None]]]

    @property
    def forward_name(self) -> str:
        """Of the node that runs it."""
        return _FORWARD + self._written

    @property
    def backward_name(self) -> str:
        """Of the node that takes the output's gradient and the inputs, and returns the gradients of
        the trained ones."""
        return _BACKWARD + self._written

    @property
    def _written(self) -> str:
        return json.dumps(vars(self), separators=(",", ":"))

    def run(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The operator's results, in order."""
        values = [_filled(argument, inputs) for argument in self.arguments]
        result = called(self.operator, values)
        return tuple(result) if isinstance(result, list | tuple) else (result,)


def call_of(name: str) -> Call | None:
    """What a node that runs an operator calls, by its :attr:`Call.forward_name`; None of others."""
    if not name.startswith(_FORWARD):
        return None
    return Call(**json.loads(name.removeprefix(_FORWARD)))


def narrowed(name: str, wanted: Sequence[int]) -> str:
    """The name of a gradient's node that computes some of the gradients.

    Args:
        name: :attr:`Call.backward_name`.
        wanted: their positions among all of them.
    """
    call = Call(**json.loads(name.removeprefix(_BACKWARD)))
    return replace(call, trained=[call.trained[i] for i in wanted]).backward_name


def is_gradient(name: str) -> bool:
    """Whether it is the name of such a gradient's node."""
    return name.startswith(_BACKWARD)


def overload_of(operator: str) -> Any:
    """torch's operator of a name and overload, "aten::add.Tensor"."""
    namespace, _, name = operator.partition("::")
    name, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")


def called(operator: str, arguments: Sequence[Any]) -> Any:
    """The operator's result.

    Args:
        operator: see :func:`overload_of`.
        arguments: all that it takes, or the first of them, in its order.
    """
    overload = overload_of(operator)
    parameters = zip(overload._schema.arguments, arguments, strict=False)
    named = {parameter.name: value for parameter, value in parameters if parameter.kwarg_only}
    return overload(*arguments[: len(arguments) - len(named)], **named)


def _filled(argument: Any, inputs: Sequence[Any]) -> Any:
    if isinstance(argument, dict):
        return inputs[argument["input"]]
    if isinstance(argument, list):
        return [_filled(item, inputs) for item in argument]
    return argument


def _forward(call: Call, *inputs: Any) -> tuple[torch.Tensor, ...]:
    return _own(call.run(_given(call, inputs)), inputs)


def _backward(call: Call, gradient: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
    assert call.output is not None
    values = _given(call, inputs)
    with torch.enable_grad():
        for position in call.trained:
            values[position] = values[position].detach().requires_grad_()
        result = call.run(values)[call.output]
    trained = [values[position] for position in call.trained]
    if not result.requires_grad:  # a step function of them
        return tuple(map(torch.zeros_like, trained))
    gradients = torch.autograd.grad(
        result, trained, gradient, allow_unused=True, materialize_grads=True
    )
    return _own(gradients, (gradient, *inputs))


def _given(call: Call, inputs: Sequence[Any]) -> list[Any]:
    """The node's inputs as the operator takes them."""
    values = list(inputs)
    for place in call.numbers:
        values[place] = values[place].item()
    for place in call.masks:
        values[place] = values[place].view(torch.bool)
    return values


def _own(results: Sequence[torch.Tensor], inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """The results in memory of their own: ONNX Runtime, which doesn't know that two tensors share
    theirs, would give one's to another."""
    taken = {_memory(each) for each in inputs if isinstance(each, torch.Tensor)}
    owned = []
    for result in results:
        if result._is_zerotensor():  # autograd's zeros, which have no memory
            result = torch.zeros(result.shape, dtype=result.dtype, device=result.device)
        elif _memory(result) in taken:
            result = result.clone()
        taken.add(_memory(result))
        owned.append(result)
    return tuple(owned)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _read(kind: str, run: Callable[..., Any], name: str) -> tuple[Callable[..., Any], set[int]]:
    call = Call(**json.loads(name.removeprefix(kind)))
    shift = 1 if kind == _BACKWARD else 0
    return functools.partial(run, call), {number + shift for number in call.numbers}


for _kind, _run in ((_FORWARD, _forward), (_BACKWARD, _backward)):
    direct_family(_kind, functools.partial(_read, _kind, _run))
