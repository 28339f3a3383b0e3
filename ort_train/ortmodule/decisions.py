"""What a forward decided in Python by a batch's sizes, and whether another batch's decide the same.

A trace keeps one outcome of `if x.shape[1] > 128`. Here the arithmetic that led there is kept, too,
as steps of a small program: torch runs them anew for each combination of sizes that it meets, on
tensors of the meta device, which have sizes and no numbers. Sizes that are asked for are numbers on
the CPU, so no device is waited for.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ort_train.ortmodule.steps import Step, Values

#: Combinations of sizes that are remembered.
_MAX_KNOWN = 4096


@dataclass(frozen=True)
class Decision:
    """A Python number or branch that was made of sizes.

    Attributes:
        value: the place of the tensor that was looked at.
        num_steps: of the program, that come before it.
        outcome: True or False of a branch; the tensor's numbers, nested as in a list, otherwise.
        where: the line of the model, as "file.py:12 (the code)".
    """

    value: int
    num_steps: int
    outcome: Any
    where: str


@dataclass
class Decisions:
    """Those of one trace, with the program that evaluates them for other sizes.

    Attributes:
        batch: place and position in the call of each of the batch's tensors that is needed.
        fixed: place, shape and data type of each parameter or buffer that is needed.
        constants: place and value of each constant; tensors by their numbers.
        steps: in order.
        made: the decisions, in order.
        only_sizes: the only ones that the outcomes are known for, where the program can't be run;
            None where it can.
    """

    batch: list[tuple[int, int]] = field(default_factory=list)
    fixed: list[tuple[int, list[int], str]] = field(default_factory=list)
    constants: list[tuple[int, Any]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    made: list[Decision] = field(default_factory=list)
    only_sizes: list[list[int]] | None = None

    def __post_init__(self) -> None:
        self._known: dict[tuple[torch.Size, ...], str | None] = {}

    def differing(self, tensors: tuple[torch.Tensor, ...]) -> str | None:
        """Where the forward would decide otherwise for a batch of these sizes, or None.

        Args:
            tensors: of the call, in the schema's order.
        """
        if not self.made:
            return None
        shapes = tuple([tensor.shape for tensor in tensors])
        if shapes in self._known:
            return self._known[shapes]
        if self.only_sizes is not None:
            is_known = [list(shape) for shape in shapes] == self.only_sizes
            return (
                None if is_known else f"{self.made[0].where}, which can't be told for other sizes"
            )
        try:
            found = self.evaluated(tensors)
        except Exception as error:  # operators that can't run on such sizes raise anything
            found = f"{self.made[0].where}, which can't be told for these sizes ({error})"
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[shapes] = found
        return found

    def hold(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """The outcomes are those of a batch of these sizes, the one that was traced."""
        self._known[tuple([tensor.shape for tensor in tensors])] = None

    def evaluated(self, tensors: tuple[torch.Tensor, ...]) -> str | None:
        """As :meth:`differing`, by running the program.

        Raises:
            Exception: of any kind, where an operator of it can't run on such sizes.
        """
        values = self._given.copy()
        for place, position in self.batch:
            tensor = torch.empty_like(tensors[position], device="meta", requires_grad=False)
            values.put(place, tensor)
        steps = iter(self.steps)
        done = 0
        # Its noise is not the run's. Behind the first other outcome, steps are not this batch's.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for decision in self.made:
                for _ in range(decision.num_steps - done):
                    values.run(next(steps))
                done = max(done, decision.num_steps)
                if outcome_of(values[decision.value], decision.outcome) != decision.outcome:
                    return decision.where
        return None

    @functools.cached_property
    def _given(self) -> Values:
        """What is the same for all sizes."""
        values = Values()
        for place, constant in self.constants:
            values.put(place, _read(constant))
        for place, shape, dtype in self.fixed:
            values.put(place, torch.empty(shape, dtype=getattr(torch, dtype), device="meta"))
        return values

    def written(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def read(written: dict[str, Any]) -> Decisions:
    """What :meth:`Decisions.written` wrote.

    Raises:
        KeyError, TypeError: where it isn't that.
    """
    steps = [
        Step(s["operator"], tuple(s["inputs"]), tuple(s["outputs"]), s["is_exact"])
        for s in written["steps"]
    ]
    made = [Decision(**decision) for decision in written["made"]]
    return Decisions(**{**written, "steps": steps, "made": made})


def outcome_of(value: Any, like: Any) -> Any:
    """What Python makes of a tensor: a branch's outcome, or its numbers.

    Args:
        like: another outcome of the same decision.
    """
    return bool(value) if isinstance(like, bool) else value.tolist()


# --- Constants


def constant(value: Any) -> Any:
    """A constant of a trace as a JSON value.

    Raises:
        TypeError: for one that can't be written.
    """
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.numel() > _MOST_NUMBERS:  # only its sizes
            return {"dtype": dtype, "shape": list(value.shape)}
        if value.is_complex():
            raise TypeError("a complex tensor")
        return {"dtype": dtype, "numbers": value.tolist(), "shape": list(value.shape)}
    if isinstance(value, torch.device):
        return {"device": True}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [constant(item) for item in value]
    raise TypeError(f"a {type(value).__name__}")


#: Of a constant tensor that a decision may depend on by more than its sizes.
_MOST_NUMBERS = 4096


def _read(written: Any) -> Any:
    if isinstance(written, list):
        return [_read(item) for item in written]
    if not isinstance(written, dict):
        return written
    if "device" in written:
        return torch.device("cpu")
    dtype = getattr(torch, written["dtype"])
    if "numbers" not in written:
        return torch.empty(written["shape"], dtype=dtype, device="meta")
    return torch.tensor(written["numbers"], dtype=dtype).reshape(written["shape"])
