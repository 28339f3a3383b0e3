"""Iterations and tokens per second of a running training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback


class SpeedCallback(TrainerCallback):
    """Clocks optimizer steps: data loading counts, evaluation and saving don't.

    The first step (export, compilation, warm-up) is kept apart in `first_step_s`.

    Args:
        baselines: iterations/s of other backends on the same batches, by name; a window then
            carries this run's ratio to each.
    """

    def __init__(self, baselines: Mapping[str, float] | None = None):
        self.baselines = dict(baselines or {})
        self.first_step_s: float | None = None
        self._total_steps, self._total_s, self._total_tokens = 0, 0.0, 0
        self._window_steps, self._window_s, self._window_tokens = 0, 0.0, 0
        self._step_tokens = 0
        self._since: float | None = None

    def add_tokens(self, num_tokens: int) -> None:
        """Tokens of a micro-batch of the current step, all ranks together."""
        self._step_tokens += num_tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step_s = None
        self._total_steps, self._total_s, self._total_tokens = 0, 0.0, 0
        self._start_window()
        self._step_tokens = 0
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        elapsed = now - (self._since if self._since is not None else now)
        if self.first_step_s is None:
            self.first_step_s = elapsed
        else:
            self._window_steps += 1
            self._window_s += elapsed
            self._window_tokens += self._step_tokens
        self._step_tokens = 0
        self._since = now

    def _resume_clock(self, *args: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    on_evaluate = _resume_clock
    on_save = _resume_clock
    on_log = _resume_clock
    on_predict = _resume_clock

    def _start_window(self) -> None:
        self._window_steps, self._window_s, self._window_tokens = 0, 0.0, 0

    def take_window(self) -> dict[str, float]:
        """Speed since the last call: `it_per_s`, `tokens_per_s`, `x_<baseline>`; then starts anew.

        Empty before the second step has ended.
        """
        if not self._window_steps or self._window_s <= 0:
            return {}
        speed = _speed(self._window_steps, self._window_s, self._window_tokens)
        for name, it_per_s in self.baselines.items():
            speed[f"x_{name}"] = round(speed["it_per_s"] / it_per_s, 2)
        self._total_steps += self._window_steps
        self._total_s += self._window_s
        self._total_tokens += self._window_tokens
        self._start_window()
        return speed

    def summary(self) -> dict[str, float]:
        """Speed over the whole training, first step left out: `it_per_s`, `tokens_per_s`."""
        steps = self._total_steps + self._window_steps
        seconds = self._total_s + self._window_s
        if not steps or seconds <= 0:
            return {}
        return _speed(steps, seconds, self._total_tokens + self._window_tokens)


def _speed(steps: int, seconds: float, tokens: int) -> dict[str, float]:
    speed = {"it_per_s": round(steps / seconds, 4)}
    if tokens:
        speed["tokens_per_s"] = round(tokens / seconds, 1)
    return speed
