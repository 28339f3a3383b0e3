"""The arithmetic on sizes: equal steps are run once, and share nothing that one of them writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ort_train.ortmodule import steps
from ort_train.ortmodule.steps import Step, Values


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were run, in order."""
    operators: list[str] = []
    run = steps._run

    def recorded(step: Step, arguments: list[Any]) -> Any:
        operators.append(step.operator)
        return run(step, arguments)

    monkeypatch.setattr(steps, "_run", recorded)
    return operators


def test_layers_of_equal_sizes_are_run_once(ran: list[str]) -> None:
    values = Values()
    values.put(0, torch.empty(2, 5, 8, device="meta"))
    num_layers = 10
    for layer in range(num_layers):
        values.put(100 + layer, torch.empty(8, 8, device="meta"))
        values.put(200 + layer, None)
        values.run(Step("aten::linear", (layer, 100 + layer, 200 + layer), (layer + 1,), False))
    assert values[num_layers].shape == (2, 5, 8)
    assert ran == ["aten::linear"]


def test_what_is_written_in_place_is_no_other_place_s(ran: list[str]) -> None:
    values = Values()
    values.put(0, torch.tensor([1, 2]))
    values.put(1, torch.tensor([1, 2]))  # equal: they share a number
    values.put(2, torch.tensor(3))
    values.put(3, 1)
    values.run(Step("aten::add_.Tensor", (0, 2, 3), (4,), True))
    assert values[4].tolist() == [4, 5]
    assert values[1].tolist() == [1, 2]


def test_numbers_that_are_drawn_are_drawn_for_each_step() -> None:
    values = Values()
    values.put(0, torch.zeros(8))
    values.put(1, 0.0)
    values.put(2, 1.0)
    values.put(3, None)
    for place in (4, 5):
        values.run(Step("aten::rand_like", (0, 3, 3, 3, 3, 3), (place,), True))
    assert values[4].tolist() != values[5].tolist()


def test_true_one_and_1_0_are_not_the_same_argument() -> None:
    values = Values()
    for place, value in enumerate((True, 1, 1.0)):
        values.put(place, value)
        values.run(Step("prim::NumToTensor", (place,), (10 + place,), True))
    assert [values[10 + place].dtype for place in range(3)] == [
        torch.bool,
        torch.int64,
        torch.float32,
    ]


def test_what_is_added_to_a_copy_stays_there() -> None:
    given = Values()
    given.put(0, 2)
    other = given.copy()
    other.put(1, 3)
    other.run(Step("prim::ListConstruct", (0, 1), (2,), True))
    assert other[2] == [2, 3]
    with pytest.raises(KeyError):
        given[1]
