"""Keeps, of a trace, the arithmetic on sizes that led to Python decisions (decisions.py)."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ort_train.ortmodule import decisions
from ort_train.ortmodule.decisions import Decision, Decisions, Step

logger = logging.getLogger(__name__)

#: Operators that ask a tensor for its shape alone.
SHAPES = frozenset({"aten::size", "aten::numel", "aten::len", "aten::dim"})
#: Those whose result shares its numbers with their first argument.
_VIEWS = frozenset(
    f"aten::{name}" for name in ("select", "slice", "view", "reshape", "unsqueeze", "transpose")
)


class Recorder:
    """The decisions of one trace, while it runs.

    Args:
        tensors: of the call that is traced, in the schema's order.
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...]):
        self._tensors = tensors
        traced = [torch._C._get_value_trace(tensor) for tensor in tensors]
        self._batch = {v.unique(): i for i, v in enumerate(traced) if v is not None}
        self._places: dict[int, int] = {}  # by a value's number in the trace
        self._values: list[Any] = []
        self._found = Decisions()
        self._constants: list[int] = []
        self._recorded: set[tuple[int, bool]] = set()

    def record(self, tensor: torch.Tensor, is_branch: bool, where: str) -> None:
        """Python made a branch's outcome or numbers of this tensor.

        Args:
            tensor: traced, and of sizes alone.
            where: the line that asked for it.
        """
        place = self._keep(torch._C._get_value_trace(tensor))
        if (place, is_branch) in self._recorded:
            return
        self._recorded.add((place, is_branch))
        base: Any = torch._C.TensorBase  # whose methods aren't guarded
        with torch._C.DisableTorchFunction():
            outcome = base.__bool__(tensor) if is_branch else base.tolist(tensor)
        made = Decision(place, len(self._found.steps), outcome, where)
        self._found.made.append(made)

    def finish(self) -> Decisions:
        """All of them, when the forward has been traced."""
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # or what is done here would be traced
        try:
            self._found.only_sizes = None if self._is_repeatable() else self._sizes()
        finally:
            torch._C._set_tracing_state(state)
        return self._found

    def _sizes(self) -> list[list[int]]:
        return [list(tensor.shape) for tensor in self._tensors]

    def _is_repeatable(self) -> bool:
        """Whether the program is whole, and comes to the outcomes of the trace."""
        found = self._found
        if not found.made:
            return True
        self._mark_exact()
        places = {p for step in found.steps if step.is_exact for p in step.outputs}
        if any(_is_written(self._values[place]) for place in places):
            logger.debug("decisions by sizes aren't repeatable: tensors of sizes are written to")
            return False
        try:
            values = [(place, self._values[place].toIValue()) for place in self._constants]
            found.constants = [(place, decisions.constant(value)) for place, value in values]
            return found.evaluated(self._tensors) is None
        except Exception as error:  # an operator that can't run on sizes alone raises anything
            logger.debug("decisions by sizes aren't repeatable: %s", error)
            return False

    def _keep(self, value: Any) -> int:
        """The place of a value, after the steps that lead to it."""
        stack = [value]
        while stack:
            item = stack[-1]
            if item.unique() in self._places:
                stack.pop()
                continue
            node = item.node()
            is_input = item.unique() in self._batch or node.kind() == "prim::Param"
            inputs = [] if is_input else list(node.inputs())
            if missing := [each for each in inputs if each.unique() not in self._places]:
                stack += missing
                continue
            stack.pop()
            self._add(item, node, [self._places[each.unique()] for each in inputs])
        return self._places[value.unique()]

    def _add(self, value: Any, node: Any, inputs: list[int]) -> None:
        found, kind = self._found, node.kind()
        if value.unique() in self._batch:
            found.batch.append((self._place(value), self._batch[value.unique()]))
        elif kind == "prim::Param":
            tensor = value.type()
            dtype = str(tensor.dtype()).removeprefix("torch.")
            found.fixed.append((self._place(value), list(tensor.sizes()), dtype))
        elif kind == "prim::Constant":
            self._constants.append(self._place(value))
        else:
            operator = kind if kind.startswith("prim::") else node.schema().split("(")[0]
            outputs = tuple(self._place(each) for each in node.outputs())
            found.steps.append(Step(operator, tuple(inputs), outputs, is_exact=False))

    def _place(self, value: Any) -> int:
        self._values.append(value)
        return self._places.setdefault(value.unique(), len(self._values) - 1)

    def _mark_exact(self) -> None:
        """Of which steps a decision, or the size of a result, takes the numbers."""
        asked = {decision.value for decision in self._found.made}
        steps = self._found.steps
        for index in reversed(range(len(steps))):
            step = steps[index]
            is_exact = not asked.isdisjoint(step.outputs)
            if step.operator.split(".")[0] not in SHAPES:
                asked.update(p for p in step.inputs if is_exact or _is_number(self._values[p]))
            steps[index] = Step(step.operator, step.inputs, step.outputs, is_exact)


def _is_number(value: Any) -> bool:
    """Whether a value of a trace is a number, or numbers, rather than a tensor with sizes."""
    kind = value.type()
    while kind.kind() in ("ListType", "OptionalType"):
        kind = kind.getElementType()
    return kind.kind() != "TensorType" or kind.dim() == 0


def _is_written(value: Any, is_view: bool = False) -> bool:
    """Whether a tensor that shares its numbers with another is written to in place.

    A trace follows a write by name, and the other's name stays that of its old numbers.
    """
    users = [(use.user, use.user.kind()) for use in value.uses() if use.offset == 0]
    views = [out for user, kind in users if kind in _VIEWS for out in user.outputs()]
    written = any(kind.endswith("_") and not kind.endswith("__") for _, kind in users)
    return (written and (is_view or bool(views))) or any(_is_written(v, True) for v in views)
