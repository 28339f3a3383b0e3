"""The clock of a training counts optimizer steps, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ort_train import metrics
from ort_train.console import describe
from ort_train.metrics import SpeedCallback


class _Clock:
    """A perf_counter that is told what passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def step(self, callback: SpeedCallback, seconds: float, tokens: int = 0) -> None:
        callback.add_tokens(tokens)
        self.now += seconds
        callback.on_step_end(None, None, None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    return _Clock(monkeypatch)


def test_first_step_is_kept_apart(clock: _Clock):
    speed = SpeedCallback()
    speed.on_train_begin(None, None, None)
    clock.step(speed, 30.0, tokens=100)
    assert speed.first_step_s == 30.0
    assert speed.take_window() == {}
    assert speed.summary() == {}
    clock.step(speed, 0.5, tokens=100)
    clock.step(speed, 0.5, tokens=100)
    assert speed.take_window() == {"it_per_s": 2.0, "tokens_per_s": 200.0}
    assert speed.take_window() == {}
    clock.step(speed, 0.25, tokens=100)
    assert speed.take_window()["it_per_s"] == 4.0
    assert speed.summary() == {"it_per_s": 2.4, "tokens_per_s": 240.0}


def test_evaluation_saving_and_logging_do_not_count(clock: _Clock):
    speed = SpeedCallback()
    speed.on_train_begin(None, None, None)
    clock.step(speed, 1.0)
    for pause in (speed.on_evaluate, speed.on_save, speed.on_log, speed.on_predict):
        clock.step(speed, 1.0)
        clock.now += 1000.0
        pause(None, None, None)
    clock.step(speed, 1.0)
    assert speed.take_window() == {"it_per_s": 1.0}


def test_micro_batches_of_a_step_add_up(clock: _Clock):
    speed = SpeedCallback()
    speed.on_train_begin(None, None, None)
    clock.step(speed, 1.0)
    for _ in range(3):
        speed.add_tokens(10)
    clock.step(speed, 2.0, tokens=10)
    assert speed.take_window() == {"it_per_s": 0.5, "tokens_per_s": 20.0}


def test_ratio_to_baselines(clock: _Clock):
    speed = SpeedCallback({"eager": 1.0, "compile": 1.5})
    speed.on_train_begin(None, None, None)
    clock.step(speed, 1.0)
    clock.step(speed, 0.5)
    assert speed.take_window() == {"it_per_s": 2.0, "x_eager": 2.0, "x_compile": 1.33}


def test_second_training_starts_anew(clock: _Clock):
    speed = SpeedCallback()
    for _ in range(2):
        speed.on_train_begin(None, None, None)
        clock.step(speed, 9.0)
        clock.step(speed, 0.5)
        clock.now += 100.0
        assert speed.first_step_s == 9.0
        assert speed.summary() == {"it_per_s": 2.0}


def test_line_of_a_log():
    logs = {"loss": 1.23456, "it_per_s": 3.456, "tokens_per_s": 12345.6, "x_eager": 2.5}
    line = describe(logs, 10, 300)
    assert line == "step 10/300  loss 1.2346  3.46 it/s  12,346 tokens/s  2.50x eager"
    assert describe({"eval_loss": 2.0}, 5, 9) == "step 5/9  evaluation loss 2.0000"
    assert describe({"train_runtime": 1.0}, 5, 9) == ""
