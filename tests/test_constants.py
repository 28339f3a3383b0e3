"""What a graph holds as constants is followed when the user changes it."""

from __future__ import annotations

import argparse
import copy
import enum
import functools
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trained_graphs import forward_of

from ort_train import OrtOptions, unwrap, wrap
from ort_train.errors import UnsupportedModelError
from ort_train.ortmodule.constants.known_tensor import KnownTensor
from ort_train.ortmodule.constants.read_values import ReadValues

MakeModel = Callable[..., Any]
NEFTUNE = "transformers.integrations.neftune"
X = torch.linspace(-1, 1, 12).reshape(4, 3)


SHIFT = 1.0
TABLE = {"shift": [1.0, 2.0]}


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def _global_shift() -> float:
    return SHIFT + TABLE["shift"][0]


class _Kind(enum.Enum):
    ONE = 1
    TWO = 2


class _Settings:
    __slots__ = ("alpha", "inner", "unread")

    def __init__(self) -> None:
        self.alpha = 0.5
        self.inner = types.SimpleNamespace(beta=1.5, kind=_Kind.ONE)
        self.unread = 0

    def factor(self) -> float:
        return self.alpha * self.inner.beta * self.inner.kind.value


class _Reader(torch.nn.Module):
    """Reads what lies deeper than a module's own attributes."""

    rate = 2.0
    table = {"a": [1.0]}

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.nested = {"a": [0.5, {"b": 2.0}]}
        self.settings = _Settings()
        self.arguments = argparse.Namespace(gamma=0.25)
        self.tensors = [torch.tensor(1.5), {"t": torch.tensor(0.5)}]
        self.array = np.array([1.0, 2.0])
        self.number = np.float32(2)
        self.choice = {1, 2}
        self.activation = _doubled
        self.partial = functools.partial(torch.add, 3)
        self.frozen = [torch.nn.Linear(3, 3).requires_grad_(False)]
        self.unread = _Settings()
        self.history: list[float] = []

    @property
    def gain(self) -> float:
        return self.nested["a"][1]["b"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) * self.nested["a"][0] * self.gain + self.settings.factor()
        y = y * self.arguments.gamma + self.tensors[0] * self.tensors[1]["t"]
        y = y + torch.from_numpy(self.array).float().sum() * self.number.item()
        y = y * len(self.choice - {2}) + self.frozen[0](x)
        y = self.partial(self.activation(y)) * self.rate * self.table["a"][0] + _global_shift()
        y = y * getattr(self, "late", 1.0)
        self.history.append(1.0)
        return y.square().mean()


class _Part(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.scale = torch.tensor(1.5)
        self.temperature = 0.5
        self.rates = {"a": 2.0}
        self.num_calls = 0
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        self.seen = x.detach()
        return self.linear(x) * self.scale / self.temperature * self.rates["a"]


class _Whole(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part = _Part()
        self.config = type("Config", (), {})()
        self.config.shift = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.part(x) + self.config.shift).square().mean()


def num_graphs_built(module: torch.nn.Module) -> int:
    forward = forward_of(module)
    return len(forward.engines) + forward._num_stale


def assert_as_eager(module: torch.nn.Module) -> None:
    expected = unwrap(copy.deepcopy(module))(X)
    # In fp32, whose unit is 6e-8 of a number, summed in another order.
    torch.testing.assert_close(module(X), expected, atol=0, rtol=2e-6)


def _replace_tensor(module: Any) -> None:
    module.part.scale = torch.tensor(2.0)


def _write_tensor(module: Any) -> None:
    module.part.scale.mul_(3)


def _drop_tensor(module: Any) -> None:
    module.part.scale = 4


def _set_number(module: Any) -> None:
    module.part.temperature = 0.25


def _set_entry(module: Any) -> None:
    module.part.rates["a"] = 3.0


def _set_config(module: Any) -> None:
    module.config.shift = 2


def _add_hook(module: Any) -> None:
    module.part.linear.register_forward_hook(lambda part, args, output: output + 1)


@pytest.mark.parametrize(
    "change",
    [
        _replace_tensor, _write_tensor, _drop_tensor, _set_number, _set_entry, _set_config,
        _add_hook,
    ],
)  # fmt: skip
def test_a_change_between_steps_is_followed(change: Callable[[Any], None]) -> None:
    module = wrap(_Whole(), backend="ort")
    assert_as_eager(module)
    before = module(X).item()
    change(module)
    assert_as_eager(module)
    assert module(X).item() != before
    assert num_graphs_built(module) == 2


def _replace_settings(module: Any) -> None:
    module.settings = _Settings()
    module.settings.alpha = 3.0


def _write_frozen(module: Any) -> None:
    module.frozen[0].weight.mul_(2)


def _replace_frozen(module: Any) -> None:
    module.frozen[0] = torch.nn.Linear(3, 3).requires_grad_(False)


def _replace_forward(module: Any) -> None:
    module.linear.forward = lambda x: torch.nn.functional.linear(x, module.linear.weight * 2)


def _shadow_class(module: Any) -> None:
    module.rate = 3.0


def _close_over(module: Any) -> None:
    """A hook around a number of its own, which changes afterwards."""
    factor = 2.0

    def scaled(part: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * factor

    module.linear.register_forward_hook(scaled)
    assert_as_eager(module)
    factor = 3.0


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.nested["a"].__setitem__(0, 2.0),
        lambda module: module.nested["a"][1].update(b=3.0),
        lambda module: setattr(module.settings, "alpha", 3.0),
        lambda module: setattr(module.settings.inner, "beta", 3.0),
        lambda module: setattr(module.settings.inner, "kind", _Kind.TWO),
        _replace_settings,
        lambda module: setattr(module.arguments, "gamma", 3.0),
        lambda module: module.tensors[0].fill_(3.0),
        lambda module: module.tensors.__setitem__(0, torch.tensor(3.0)),
        lambda module: module.tensors[1].update(t=torch.tensor(3.0)),
        lambda module: module.array.fill(3.0),
        lambda module: setattr(module, "number", np.float32(3)),
        lambda module: module.choice.update((3, 4)),
        lambda module: setattr(module, "activation", torch.tanh),
        lambda module: setattr(module, "partial", functools.partial(torch.add, 4)),
        _write_frozen,
        _replace_frozen,
        _replace_forward,
        _shadow_class,
        _close_over,
        lambda module: setattr(module, "late", 3.0),
    ],
)
def test_a_change_of_what_lies_deeper_is_followed(change: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    module = wrap(_Reader(), backend="ort")
    assert_as_eager(module)
    before = module(X).item()
    with torch.no_grad():
        change(module)
    assert_as_eager(module)
    assert module(X).item() != before


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (sys.modules[__name__], "SHIFT", 3.0),
        (sys.modules[__name__], "TABLE", {"shift": [3.0]}),
        (TABLE, "shift", [3.0]),
        (_Reader, "rate", 3.0),
        (_Reader.table, "a", [3.0]),
        (_Reader, "gain", property(lambda module: 3.0)),
        (_Settings, "factor", lambda settings: 3.0),
    ],
)
def test_a_change_of_classes_and_globals_is_followed(
    owner: Any, name: Any, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = wrap(_Reader(), backend="ort")
    assert_as_eager(module)
    before = module(X).item()
    change: Any = monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr
    change(owner, name, value)
    assert_as_eager(module)
    assert module(X).item() != before


def test_what_no_code_of_a_forward_names_needs_no_new_graph() -> None:
    module = wrap(_Reader(), backend="ort")
    for step in range(3):
        module(X)
        module.settings.unread = step
        module.unread.alpha = float(step)
        module.settings.inner = types.SimpleNamespace(beta=1.5, kind=_Kind.ONE)
        module.later = step
    assert num_graphs_built(module) == 1


def test_a_closure_may_have_no_value_yet() -> None:
    def scaled(part: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (factor if is_scaled else 2.0)

    module = wrap(_Whole(), backend="ort")
    module.part.linear.register_forward_hook(scaled)
    is_scaled = False
    assert_as_eager(module)
    factor, is_scaled = 3.0, True
    assert_as_eager(module)


def test_a_large_tensor_is_known_by_its_digest() -> None:
    tensor = torch.zeros(2**21)
    known = KnownTensor.of(tensor)
    assert isinstance(known.value, str)
    tensor.add_(0)
    assert not known.is_untouched(tensor)
    assert known.is_same(tensor)
    assert known.is_same(tensor.clone())
    assert not known.is_same(tensor.view(2, -1))
    tensor[-1] = 1
    assert not known.is_same(tensor)


def test_a_tensor_of_inference_mode_is_compared_by_value() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(3)
        known = KnownTensor.of(tensor)
        tensor.add_(1)
    assert not known.is_same(tensor)


def test_what_says_the_same_needs_no_new_graph() -> None:
    """As does what the forward writes itself: counters, and what it keeps for others to look at."""
    module = wrap(_Whole(), backend="ort")
    for _ in range(3):
        module(X)
        module.part.scale = module.part.scale.clone()
        module.part.temperature = float("0.5")
        module.part.rates = dict(module.part.rates)
    assert num_graphs_built(module) == 1


def test_saving_and_generating_need_no_new_graph(tiny_llama: MakeModel, tmp_path: Path) -> None:
    model = wrap(tiny_llama(), backend="ort")
    ids = torch.arange(24).reshape(2, 12)
    for _ in range(2):
        model(input_ids=ids, labels=ids)
        model.save_pretrained(tmp_path)
        model.eval().generate(ids[:1, :3], max_new_tokens=2, do_sample=False)
        model.train()
    assert num_graphs_built(model) == 1


def test_a_change_in_every_step_is_an_error_after_max_graphs() -> None:
    module = wrap(_Whole(), backend="ort", options=OrtOptions(max_graphs=2))
    for temperature in (1.0, 2.0):
        module.part.temperature = temperature
        module(X)
    module.part.temperature = 3.0
    with pytest.raises(UnsupportedModelError, match=r"'part\.temperature'.*persistent=True"):
        module(X)


def test_a_global_that_changes_in_every_step_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = wrap(_Reader(), backend="ort", options=OrtOptions(max_graphs=1))
    module(X)
    monkeypatch.setitem(TABLE, "shift", [3.0])
    with pytest.raises(UnsupportedModelError, match=r"global .test_constants\.TABLE\['shift'\]"):
        module(X)


def test_numbers_are_told_from_equal_ones_of_other_types_and_nan_from_nothing() -> None:
    module = torch.nn.Module()
    module.value, module.none, module.rest = 1, None, [1, math.nan]
    attributes = ReadValues(module, module.forward)
    assert attributes.changed() is None
    module.rest = [1, math.nan]
    assert attributes.changed() is None
    module.value = True
    assert attributes.changed() == "attribute 'value'"
    module.value, module.none = 1, torch.ones(2)
    assert attributes.changed() == "attribute 'none'"
    del module.none
    assert attributes.changed() == "attribute 'none'"


@pytest.mark.parametrize("length", [8, 32])
def test_noise_of_neftune_is_that_of_each_batchs_length(
    length: int, caplog: pytest.LogCaptureFixture
) -> None:
    neftune = pytest.importorskip(NEFTUNE, reason="transformers 4.57 has it elsewhere")

    module: Any = torch.nn.Sequential(torch.nn.Embedding(10, 16))
    torch.nn.init.zeros_(module[0].weight)
    module[0].neftune_noise_alpha = 5.0
    module[0].register_forward_hook(neftune.neftune_post_forward_hook)
    wrap(module, backend="ort")
    module(torch.zeros(2, 5, dtype=torch.long))  # the graph's first batch
    ids = torch.zeros(64, length, dtype=torch.long)
    noise, other = module(ids).detach(), module(ids).detach()
    bound = 5 / math.sqrt(length * 16)
    assert noise.abs().max() <= bound
    # Uniform in +-bound: variance bound^2 / 3, whose relative standard error over n values is
    # sqrt(0.8 / n), 1% for the fewest here (64 x 8 x 16); 5 of them.
    assert noise.var().item() == pytest.approx(bound**2 / 3, rel=0.05)
    assert abs(noise.mean().item()) < 5 * bound / math.sqrt(3 * noise.numel())
    assert not torch.equal(noise, other)
    assert "a resumed run draws other than one that goes on" in caplog.text


def test_noise_of_neftune_follows_the_seed_from_run_to_run(tiny_llama: MakeModel) -> None:
    neftune = pytest.importorskip(NEFTUNE, reason="transformers 4.57 has it elsewhere")

    def losses() -> list[float]:
        model = tiny_llama()
        neftune.activate_neftune(model, 100.0)
        wrap(model, backend="ort")
        torch.manual_seed(5)
        return [model(input_ids=ids, labels=ids).loss.item() for _ in range(3)]

    ids = torch.arange(24).reshape(2, 12)
    assert losses() == losses()


def test_neftune_goes_with_its_hook(tiny_llama: MakeModel) -> None:
    neftune = pytest.importorskip(NEFTUNE, reason="transformers 4.57 has it elsewhere")

    model = tiny_llama()
    ids = torch.arange(24).reshape(2, 12)
    plain = wrap(model, backend="ort")(input_ids=ids, labels=ids).loss.item()
    handle = neftune.activate_neftune(model, 100.0)
    noisy = {model(input_ids=ids, labels=ids).loss.item() for _ in range(3)}
    assert len(noisy) == 3
    assert plain not in noisy
    neftune.deactivate_neftune(model, handle)
    assert model(input_ids=ids, labels=ids).loss.item() == plain
