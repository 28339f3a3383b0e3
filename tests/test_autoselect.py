"""backend auto: the fastest of those that agree with eager, chosen without a trace in training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_graphs import forward_of
from transformers.modeling_outputs import MaskedLMOutput

from ort_train import OrtOptions, decision, wrap
from ort_train.auto import trial
from ort_train.auto.candidates import Candidate, densities, sparser
from ort_train.auto.trial import Decision, Trial
from ort_train.errors import ConfigError

pytestmark = pytest.mark.usefixtures("shared_graphs")


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
    monkeypatch.setattr(trial, "CONCRETE_BACKENDS", ("eager", "ort"))


def times(monkeypatch: pytest.MonkeyPatch, **step_ms: float) -> None:
    """Let each backend, in fp32 unless another precision is named, seem to take this long."""
    by_name = {str(Candidate(name, "fp32")): ms for name, ms in step_ms.items()}
    by_name |= {name.replace("_", " "): ms for name, ms in step_ms.items() if "_" in name}
    monkeypatch.setattr(Trial, "_timed_ms", lambda self, which, call: by_name[str(which)])


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
    with caplog.at_level(logging.WARNING, "ort_train.auto.autoselect"):
        train(module, 4)
    made = decision(module)
    assert made is not None
    assert (made.backend, made.precision, made.sparsity) == (fastest, "fp32", ())
    assert made.step_ms == {f"{fastest} fp32": 1.0, f"{slower} fp32": 2.0}
    assert made.rejected == {}
    assert made.cost_s > 0
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == str(made)
    assert f"backend auto: {fastest}" in message
    assert "trial" in message


@pytest.mark.parametrize(("fastest", "second"), [("eager", None), ("ort", True)])
def test_graph_from_the_cache_is_told_of_what_was_chosen(
    fastest: str, second: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ORT_TRAIN_GRAPH_CACHE", str(tmp_path))
    times(monkeypatch, **{"eager": 2.0, "ort": 2.0, fastest: 1.0})
    told = []
    for _ in range(2):
        module = wrap(_Net(), backend="auto")
        assert forward_of(module) is None
        train(module, 3)
        told.append(getattr(forward_of(module), "graph_from_cache", None))
    assert told == [None if second is None else False, second]


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
        raise RuntimeError("no operator aten::strange. Train it elsewhere\nand a long trace")

    return run


def _fails_without_a_word(module: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    return run


def _nan(module: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: {"loss": original(*args, **kwargs)["loss"] * float("nan")}


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (_Wrong, "disagrees with eager fp32 (loss by 0.0e+00, gradients by 5.0e-01)"),
        (_raises, "no operator aten::strange. Train it elsewhere"),
        (_fails_without_a_word, "AssertionError"),
        (_nan, "disagrees with eager fp32"),
    ],
)
def test_backend_that_is_wrong_or_fails_is_left_out(
    made: Any, reason: str, monkeypatch: pytest.MonkeyPatch
):
    times(monkeypatch, eager=2.0, ort=1.0)
    factory = trial.runner_factory
    monkeypatch.setattr(
        trial,
        "runner_factory",
        lambda name, *args: made if name == "ort" else factory(name, *args),
    )
    module = wrap(_Net(), backend="auto")
    expected = train(_Net(), 4)
    assert train(module, 4) == expected
    chosen = decision(module)
    assert chosen is not None
    assert chosen.backend == "eager"
    assert chosen.rejected["ort fp32"].startswith(reason)
    assert "\n" not in str(chosen)


def test_log_quotes_the_first_sentence_of_an_error_and_debug_all_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    factory = trial.runner_factory
    monkeypatch.setattr(
        trial,
        "runner_factory",
        lambda name, *args: _raises if name == "ort" else factory(name, *args),
    )
    caplog.set_level(logging.DEBUG, "ort_train")
    train(wrap(_Net(), backend="auto"), 3)
    by_level = {record.levelno: record.getMessage() for record in caplog.records}
    assert by_level[logging.WARNING].endswith("; ort fp32 left out: no operator aten::strange)")
    assert by_level[logging.DEBUG] == (
        "ort fp32 left out: no operator aten::strange. Train it elsewhere\nand a long trace"
    )


def test_backend_that_cannot_run_here_is_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        trial, "available", lambda name, *a: (name == "eager", "no such thing here")
    )
    module = wrap(_Net(), backend="auto")
    train(module, 3)
    chosen = decision(module)
    assert chosen is not None
    assert chosen.rejected == {"ort fp32": "no such thing here"}


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
    made = Decision(
        "ort",
        "bf16",
        ("padding_sparsity",),
        {"eager fp32": 2.0, "ort bf16 + padding_sparsity": 1.0},
        {"compile fp32": "no compiler"},
        3.21,
    )
    assert str(made) == (
        "backend auto: ort bf16 + padding_sparsity (eager fp32 2.0 ms, "
        "ort bf16 + padding_sparsity 1.0 ms a step; trial 3.2 s; compile fp32 left out: "
        "no compiler)"
    )


# --- precision ---


needs_bf16 = pytest.mark.skipif(
    trial.no_bf16("cpu") is not None, reason="this CPU has no bf16 products in hardware"
)


@needs_bf16
def test_precision_auto_takes_bf16_where_that_is_faster(monkeypatch: pytest.MonkeyPatch):
    times(monkeypatch, eager=2.0, ort=1.5, eager_bf16=1.8, ort_bf16=1.0)
    module = wrap(_Net(), backend="auto", precision="auto")
    found = train(module, 6)
    chosen = decision(module)
    assert chosen is not None
    assert (chosen.backend, chosen.precision) == ("ort", "bf16"), chosen
    assert list(chosen.step_ms) == ["eager fp32", "ort fp32", "eager bf16", "ort bf16"]
    # Losses around 0.3, of products rounded to 8 bits: some 1e-3 of them.
    assert found == pytest.approx(train(_Net(), 6), abs=3e-3)


def test_fp32_never_becomes_bf16(monkeypatch: pytest.MonkeyPatch):
    times(monkeypatch, eager=2.0, ort=1.5, eager_bf16=0.1, ort_bf16=0.1)
    module = wrap(_Net(), backend="auto")
    train(module, 3)
    chosen = decision(module)
    assert chosen is not None
    assert chosen.precision == "fp32"
    assert list(chosen.step_ms) == ["eager fp32", "ort fp32"]


def test_precision_auto_without_bf16_in_hardware(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trial, "no_bf16", lambda device_type: "no such products here")
    times(monkeypatch, eager=2.0, ort=1.5)
    module = wrap(_Net(), backend="auto", precision="auto")
    train(module, 3)
    chosen = decision(module)
    assert chosen is not None
    assert (chosen.backend, chosen.precision) == ("ort", "fp32")
    no = "no such products here"
    assert chosen.rejected == {"eager bf16": no, "ort bf16": no}


@needs_bf16
def test_bf16_that_is_farther_off_than_autocast_is_left_out(monkeypatch: pytest.MonkeyPatch):
    """By 5%, which the tolerance of bf16 alone would let pass."""
    times(monkeypatch, eager=2.0, ort=1.5, eager_bf16=1.8, ort_bf16=1.0)
    factory = trial.runner_factory

    def slightly_wrong(module: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            loss = original(*args, **kwargs)["loss"]
            return {"loss": loss * 1.05 - loss.detach() * 0.05}

        return run

    monkeypatch.setattr(
        trial,
        "runner_factory",
        lambda name, precision, *args: (
            slightly_wrong if (name, precision) == ("ort", "bf16")
            else factory(name, precision, *args)
        ),
    )  # fmt: skip
    module = wrap(_Net(), backend="auto", precision="auto")
    train(module, 3)
    chosen = decision(module)
    assert chosen is not None
    assert (chosen.backend, chosen.precision) == ("ort", "fp32")
    assert "gradients by 5.0e-02" in chosen.rejected["ort bf16"]


def test_precision_auto_is_of_backend_auto_only():
    with pytest.raises(ConfigError, match="chosen by backend 'auto'"):
        wrap(_Net(), backend="ort", precision="auto")


# --- sparsity ---


def test_densities_of_calls():
    labels = torch.tensor([[1, -100, 2, -100]])
    mask = torch.tensor([[1, 1, 1, 0]])

    def forward(input_ids: Any, attention_mask: Any = None, labels: Any = None) -> None: ...

    calls = [((labels, mask), {"labels": labels}), ((labels,), {"attention_mask": mask * 0})]
    assert densities(forward, calls) == {"label_sparsity": 0.5, "padding_sparsity": 3 / 8}
    whole_samples = [((), {"labels": torch.tensor([1, 0]), "attention_mask": mask[None]})]
    assert densities(forward, whole_samples) == {"label_sparsity": 1, "padding_sparsity": 1}


def test_what_may_be_left_out_is_what_the_user_left_open():
    ort = Candidate("ort", "fp32")
    density = {"label_sparsity": 0.3, "padding_sparsity": 0.6}
    open_, both = OrtOptions(), ("label_sparsity", "padding_sparsity")
    assert [c.sparsity for c in sparser(ort, open_, density)] == [both, both[:1], both[1:]]
    labels_off = OrtOptions(label_sparsity=False)
    assert [c.sparsity for c in sparser(ort, labels_off, density)] == [both[1:]]
    assert sparser(ort, OrtOptions(label_sparsity=True, padding_sparsity=True), density) == []
    assert sparser(ort, open_, dict.fromkeys(density, 1.0)) == []


def padded_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(16) < torch.tensor([[5], [9], [16], [3]])).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(16) < 2), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tried_on_padding(model: torch.nn.Module, options: OrtOptions | None = None, **kwargs: Any):
    module = wrap(model.train(), backend="auto", options=options, **kwargs)
    batch = padded_batch()
    for _ in range(2):
        module(**batch).loss.backward()
    chosen = decision(module)
    assert chosen is not None
    return chosen


SPARSE_MS = {
    "eager fp32": 2.0,
    "ort fp32": 2.1,  # not the fastest until it leaves something out
    "ort fp32 + label_sparsity": 1.8,
    "ort fp32 + padding_sparsity": 1.2,
    "ort fp32 + label_sparsity + padding_sparsity": 1.0,
}


def test_sparsity_is_turned_on_where_it_is_faster(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Trial, "_timed_ms", lambda self, which, call: SPARSE_MS[str(which)])
    chosen = tried_on_padding(tiny_llama(), loss_only=True)
    assert chosen.backend == "ort"
    assert chosen.sparsity == ("label_sparsity", "padding_sparsity")
    both = "ort fp32 + label_sparsity + padding_sparsity"
    assert list(chosen.step_ms) == ["eager fp32", "ort fp32", both]


def test_sparsity_of_a_loop_that_may_read_more_is_left(
    tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Trial, "_timed_ms", lambda self, which, call: SPARSE_MS[str(which)])
    chosen = tried_on_padding(tiny_llama())
    assert (chosen.backend, chosen.sparsity) == ("eager", ())
    with pytest.raises(ConfigError, match="loss_only is read by backend 'auto' only"):
        wrap(_Net(), backend="ort", loss_only=True)


def test_refused_sparsity_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch):
    """Labels can be left out of this net, padding can't, as its tokens meet in a sum."""
    monkeypatch.setattr(Trial, "_timed_ms", lambda self, which, call: SPARSE_MS[str(which)])

    class Sums(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = torch.nn.Embedding(64, 8)
            self.head = torch.nn.Linear(8, 64)

        def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
            hidden = self.embedding(input_ids) + attention_mask[..., None]
            logits = self.head(hidden + hidden.mean(1, keepdim=True))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return MaskedLMOutput(loss=loss, logits=logits)

    chosen = tried_on_padding(Sums(), loss_only=True)
    assert chosen.sparsity == ("label_sparsity",), chosen
    refused = [name for name in chosen.rejected if "padding_sparsity" in name]
    assert len(refused) == 2
    assert all("padding" in chosen.rejected[name] for name in refused)


# --- ranks ---


def test_what_another_rank_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch):
    """All ranks choose from the same, by the mean of their times."""
    times(monkeypatch, eager=2.0, ort=1.0)
    monkeypatch.setattr(
        trial,
        "_among_ranks",
        lambda values, device, how: [0.0 for _ in values] if how == "min" else list(values),
    )
    module = wrap(_Net(), backend="auto")
    train(module, 3)
    chosen = decision(module)
    assert chosen is not None
    assert chosen.backend == "eager"
    assert chosen.rejected == {"ort fp32": "another rank can't run it"}


def test_times_of_all_ranks_decide(monkeypatch: pytest.MonkeyPatch):
    times(monkeypatch, eager=2.0, ort=1.0)  # here; on the other rank ort took 5 and eager 2

    def mean(values: Any, device: Any, how: str) -> list[float]:
        here = list(values)
        there = {1.0: 5.0}
        return here if how == "min" else [(v + there.get(v, v)) / 2 for v in here]

    monkeypatch.setattr(trial, "_among_ranks", mean)
    module = wrap(_Net(), backend="auto")
    train(module, 3)
    chosen = decision(module)
    assert chosen is not None
    assert chosen.backend == "eager"
    assert chosen.step_ms == {"eager fp32": 2.0, "ort fp32": 3.0}


# --- timing ---


@pytest.mark.parametrize(
    ("ort_ms", "num_rounds"),
    # Within 3%: as many as are allowed; else until the disturbed ones are less than a fifth.
    [(0.99, trial.MAX_ROUNDS), (0.5, 10), (2.0, trial.NUM_ROUNDS)],
)
def test_rounds_go_on_while_two_are_near(
    ort_ms: float, num_rounds: int, monkeypatch: pytest.MonkeyPatch
):
    """A disturbance of the first rounds doesn't decide, and who is far behind is left there."""
    counts = {"eager": 0, "ort": 0}

    def timed(self: Trial, which: Candidate, call: Any) -> float:
        counts[which.backend] += 1
        is_disturbed = counts[which.backend] <= 4  # of two calls a round
        return 1.0 if which.backend == "eager" or (is_disturbed and ort_ms < 1) else ort_ms

    monkeypatch.setattr(Trial, "_timed_ms", timed)
    monkeypatch.setattr(trial, "MIN_FURTHER_S", 0.0)  # time seems to pass as told
    module = wrap(_Net(), backend="auto")
    train(module, 3)
    chosen = decision(module)
    assert chosen is not None
    assert chosen.backend == ("ort" if ort_ms < 1 else "eager")
    assert counts["eager"] == counts["ort"] == 2 * num_rounds
