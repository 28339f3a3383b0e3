"""backend auto: the fastest of those that agree with eager, chosen without a trace in training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ort_train import autoselect, decision, wrap
from ort_train.autoselect import AutoRunner, Decision


class _Net(torch.nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(6, 6)
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(6, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.head(self.dropout(self.linear(x))).square().mean()}


@pytest.fixture(autouse=True)
def _without_compile(monkeypatch: pytest.MonkeyPatch):
    """Compiling takes a minute on a busy machine; test_backends compiles once."""
    monkeypatch.setattr(autoselect, "CONCRETE_BACKENDS", ("eager", "ort"))


def times(monkeypatch: pytest.MonkeyPatch, **step_ms: float) -> None:
    monkeypatch.setattr(AutoRunner, "_timed_ms", lambda self, name, call: step_ms[name])


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))


def train(module: torch.nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        loss = module(X + i / 9)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("fastest", ["eager", "ort"])
def test_fastest_is_kept_and_said(
    fastest: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    slower = {"eager": "ort", "ort": "eager"}[fastest]
    times(monkeypatch, **{fastest: 1.0, slower: 2.0})
    module = wrap(_Net(), backend="auto")
    assert decision(module) is None
    with caplog.at_level(logging.WARNING, "ort_train.autoselect"):
        train(module, 4)
    made = decision(module)
    assert made is not None
    assert made.backend == fastest
    assert made.step_ms == {fastest: 1.0, slower: 2.0}
    assert made.rejected == {}
    assert made.cost_s > 0
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == str(made)
    assert f"backend auto: {fastest}" in message
    assert "trial" in message


def test_training_is_eagers(monkeypatch: pytest.MonkeyPatch):
    times(monkeypatch, eager=2.0, ort=1.0)
    found = train(wrap(_Net(), backend="auto"), 8)
    # fp32, a few steps of plain SGD
    assert found == pytest.approx(train(_Net(), 8), abs=1e-5)


def test_trial_leaves_gradients_buffers_and_random_state(monkeypatch: pytest.MonkeyPatch):
    times(monkeypatch, eager=1.0, ort=2.0)
    module, eager = wrap(_Net(dropout=0.5), backend="auto"), _Net(dropout=0.5)
    for each in (module, eager):
        torch.manual_seed(5)
        for i in range(4):  # the trial falls into the second call, gradients accumulate
            each(X + i)["loss"].backward()
    assert torch.equal(module.head.weight.grad, eager.head.weight.grad)
    assert torch.equal(module.calls, eager.calls)


class _Wrong:
    """A runner whose gradients are half of what they should be."""

    def __init__(self, module: Any, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        loss = self.original(*args, **kwargs)["loss"]
        return {"loss": loss * 0.5 + loss.detach() * 0.5}


def _raises(module: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("operator aten::strange\nand a long trace")

    return run


def _nan(module: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: {"loss": original(*args, **kwargs)["loss"] * float("nan")}


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (_Wrong, "disagrees with eager (loss by 0.0e+00, gradients by 5.0e-01)"),
        (_raises, "operator aten::strange"),
        (_nan, "disagrees with eager"),
    ],
)
def test_backend_that_is_wrong_or_fails_is_left_out(
    made: Any, reason: str, monkeypatch: pytest.MonkeyPatch
):
    times(monkeypatch, eager=2.0, ort=1.0)
    factory = autoselect.runner_factory
    monkeypatch.setattr(
        autoselect,
        "runner_factory",
        lambda name, *args: made if name == "ort" else factory(name, *args),
    )
    module = wrap(_Net(), backend="auto")
    expected = train(_Net(), 4)
    assert train(module, 4) == expected
    chosen = decision(module)
    assert chosen is not None
    assert chosen.backend == "eager"
    assert chosen.rejected["ort"].startswith(reason)
    assert "\n" not in str(chosen)


def test_backend_that_cannot_run_here_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        autoselect, "available", lambda name, *a: (name == "eager", "no such thing here")
    )
    module = wrap(_Net(), backend="auto")
    train(module, 3)
    chosen = decision(module)
    assert chosen is not None
    assert chosen.rejected == {"ort": "no such thing here"}


def test_dropout_is_no_disagreement(monkeypatch: pytest.MonkeyPatch):
    """Masks differ between backends, and eager differs as much from itself."""
    times(monkeypatch, eager=2.0, ort=1.0)
    module = wrap(_Net(dropout=0.1), backend="auto")
    train(module, 3)
    chosen = decision(module)
    assert chosen is not None
    assert chosen.backend == "ort", chosen.rejected


def test_loop_may_reuse_its_batch(monkeypatch: pytest.MonkeyPatch):
    times(monkeypatch, eager=2.0, ort=1.0)
    module, eager = wrap(_Net(), backend="auto"), _Net()
    buffer = torch.empty(8, 6)
    for i in range(4):
        buffer.copy_(X + i)
        assert module(buffer)["loss"].item() == pytest.approx(
            eager(buffer)["loss"].item(), abs=1e-5
        )


def test_evaluation_between_does_not_count():
    module = wrap(_Net(), backend="auto")
    module.eval()(X)
    with torch.no_grad():
        module.train()(X)
    module(X)["loss"].backward()
    assert decision(module) is None


def test_copies_make_their_own_choice(monkeypatch: pytest.MonkeyPatch):
    times(monkeypatch, eager=1.0, ort=2.0)
    module = wrap(_Net(), backend="auto")
    train(module, 3)
    twin = copy.deepcopy(module)
    assert decision(twin) is None
    train(twin, 3)
    assert decision(twin) is not None


def test_gradients_of_inputs_reach_the_caller(monkeypatch: pytest.MonkeyPatch):
    times(monkeypatch, eager=2.0, ort=1.0)
    module = wrap(_Net(), backend="auto")
    for _ in range(4):
        x = X.clone().requires_grad_()
        module(x)["loss"].backward()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0


def test_nothing_trainable_but_the_input(monkeypatch: pytest.MonkeyPatch):
    times(monkeypatch, eager=2.0, ort=1.0)
    module = wrap(_Net().requires_grad_(False), backend="auto")
    for _ in range(3):
        x = X.clone().requires_grad_()
        module(x)["loss"].backward()
        assert x.grad is not None


def test_decision_reads_well():
    made = Decision("ort", {"eager": 2.0, "ort": 1.0}, {"compile": "no compiler"}, 3.21)
    assert str(made) == (
        "backend auto: ort (eager 2.0 ms, ort 1.0 ms a step; trial 3.2 s; compile left out: "
        "no compiler)"
    )
