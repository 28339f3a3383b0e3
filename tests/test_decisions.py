"""Python decisions on a batch's sizes: each outcome has a graph of its own, equal ones share it.

Tolerances: fp32 carries 24 bits, and the modules are a few sums of numbers below 1; the wrong
branch or number is off by 1e-2 and more, and trains another layer.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_graphs import engines

from ort_train import OrtOptions, unwrap, wrap
from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule import decisions

HIDDEN = 8
OPTIONS = OrtOptions(num_threads=1, export_cache=False)


class Layer(torch.nn.Module):
    """Two projections, and what becomes of them is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = torch.nn.Linear(HIDDEN, HIDDEN)
        self.other = torch.nn.Linear(HIDDEN, HIDDEN)


class Branch(Layer):
    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        if x_BTH.shape[1] > 4:
            return self.one(x_BTH).tanh().mean()
        return self.other(x_BTH).sin().mean()


class Loop(Layer):
    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        hidden = self.one(x_BTH[:, 0])
        for t in range(x_BTH.shape[1]):
            hidden = torch.tanh(self.other(hidden) + x_BTH[:, t])
        return hidden.mean()


class Length(Layer):
    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        return self.one(x_BTH).sin().sum() / len(x_BTH)


class Root(Layer):
    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        return self.one(x_BTH).sin().mean() / math.sqrt(x_BTH.shape[1])


class Number(Layer):
    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        return self.one(x_BTH).sin().mean() * int(x_BTH.shape[1]) + self.other(x_BTH).mean()


class Rows(Layer):
    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        return sum(self.one(row).sin().sum() * i for i, row in enumerate(x_BTH, start=1))


class Picked(Layer):
    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        last = x_BTH.shape[1] - 1
        return self.one(x_BTH[:, [0, last]]).sin().mean()


class Halved(Layer):
    """Decides by the size of what it has computed, below another module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Branch()

    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        return self.inner(self.one(x_BTH)[:, ::2]) + self.other(x_BTH).mean()


class Convolved(Layer):
    """Decides by the length that a convolution leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Branch()
        self.convolution = torch.nn.Conv1d(HIDDEN, HIDDEN, 3, stride=2)

    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        return self.inner(self.convolution(x_BTH.mT).mT)


class Written(Layer):
    """Decides by a tensor of sizes that is written to in place."""

    def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
        sizes = torch.zeros(2, dtype=torch.int64)
        sizes[1] = x_BTH.shape[1]
        if sizes[1] > 4:
            return self.one(x_BTH).tanh().mean()
        return self.other(x_BTH).sin().mean()


def batch(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rows + length)
    return torch.randn(rows, length, HIDDEN, generator=generator)


def gradients(module: torch.nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Loss, and the gradient of each parameter, or zeros."""
    module.zero_grad()
    loss = module(inputs)
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    return [loss.detach(), *found]


def assert_as_eager(module: torch.nn.Module, inputs: torch.Tensor) -> None:
    """Loss and gradients of a wrapped module are those of a plain copy."""
    expected = gradients(unwrap(copy.deepcopy(module)), inputs)
    torch.testing.assert_close(gradients(module, inputs), expected, atol=1e-5, rtol=1e-4)


# --- graphs of their own


@pytest.mark.parametrize(
    ("make", "lengths", "num_graphs"),
    [
        (Branch, [3, 6, 4, 9, 2, 5], 2),
        (Halved, [6, 11, 8, 9, 7], 2),
        (Convolved, [9, 12, 7, 13, 10], 2),
        (Written, [3, 6, 4], 3),  # a graph for each length, as what is written isn't followed
        (Loop, [3, 5, 3, 2, 5], 3),
        (Number, [3, 5, 3], 2),
        (Root, [3, 5, 3], 2),
        (Picked, [3, 5, 3], 2),
    ],
)
def test_as_eager_back_and_forth(
    make: Callable[[], Any], lengths: list[int], num_graphs: int
) -> None:
    module = wrap(make(), backend="ort", options=OPTIONS)
    for length in lengths:
        assert_as_eager(module, batch(2, length))
    assert len(engines(module)) == num_graphs


@pytest.mark.parametrize("make", [Length, Rows])
def test_numbers_of_rows(make: Callable[[], Any]) -> None:
    module = wrap(make(), backend="ort", options=OPTIONS)
    for rows in (2, 3, 2, 4, 3):
        assert_as_eager(module, batch(rows, 5))
    assert len(engines(module)) == 3
    assert_as_eager(module, batch(3, 7))
    assert len(engines(module)) == 3


def test_outcomes_are_looked_up_for_sizes_that_were_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = wrap(Branch(), backend="ort", options=OPTIONS)
    for length in (3, 6, 2, 7):
        module(batch(2, length)).backward()
    monkeypatch.setattr(decisions.Values, "run", None)  # or the next would fail
    for length in (7, 2, 6, 3):
        module(batch(2, length)).backward()
    assert len(engines(module)) == 2


def test_too_many_graphs_name_the_line() -> None:
    module = wrap(Loop(), backend="ort", options=OrtOptions(max_graphs=2, export_cache=False))
    for length in (2, 3):
        module(batch(2, length))
    where = r"test_decisions\.py:\d+ \(for t in range\(x_BTH\.shape\[1\]\):\)"
    with pytest.raises(UnsupportedModelError, match=rf"max_graphs=2: {where} .* pad batches"):
        module(batch(2, 4))


def test_random_state_is_left_alone() -> None:
    """Steps that draw numbers, of which only the size is asked for, draw none of the run's."""

    class Noisy(Layer):
        def forward(self, x_BTH: torch.Tensor) -> torch.Tensor:
            noise = torch.rand(x_BTH.shape[1], 2)
            scale = 2.0 if torch.cat([noise, noise]).shape[0] > 6 else 1.0
            return self.one(x_BTH).sin().mean() * scale

    module = wrap(Noisy(), backend="ort", options=OPTIONS)
    assert_as_eager(module, batch(2, 3))
    state = torch.get_rng_state()
    module(batch(2, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(engines(module)) == 1


@pytest.mark.filterwarnings("ignore:this CPU has no bf16 products")
def test_branches_in_bf16() -> None:
    module = wrap(Branch(), backend="ort", precision="bf16", options=OPTIONS)
    for length in (3, 6, 4):
        expected = gradients(unwrap(copy.deepcopy(module)), batch(2, length))
        # bf16 carries 8 bits; the other branch has gradients where these are 0.
        torch.testing.assert_close(
            gradients(module, batch(2, length)), expected, atol=5e-3, rtol=2e-2
        )
    assert len(engines(module)) == 2


def test_a_second_start_decides_by_what_the_cache_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORT_TRAIN_GRAPH_CACHE", str(tmp_path))
    lengths = (6, 11, 8, 9)
    for is_second in (False, True):
        if is_second:
            monkeypatch.setattr(torch.onnx, "export", None)  # calling it is an error
        module = wrap(Halved(), backend="ort", options=OrtOptions(num_threads=1))
        for length in lengths:
            assert_as_eager(module, batch(2, length))
        first, second = engines(module)
        assert (first.saved_s is not None) == (second.saved_s is not None) == is_second


@pytest.mark.parametrize("value", [1.5, None, [1, 2], torch.arange(3), torch.zeros(9, 999)])
def test_constants_are_read_as_they_were_written(value: Any) -> None:
    found = decisions._read(json.loads(json.dumps(decisions.constant(value))))
    if isinstance(value, torch.Tensor):
        assert (found.shape, found.dtype) == (value.shape, value.dtype)
        assert found.is_meta or torch.equal(found, value)
    else:
        assert found == value
