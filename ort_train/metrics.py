"""Of a running training: iterations and tokens per second, and the density of its batches."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from ort_train.data.batches import IGNORED_LABEL


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


class SparsityMeter:
    """How dense the batches of a training were, and what that saved."""

    def __init__(self) -> None:
        self._start_window()

    def _start_window(self) -> None:
        # Counts stay on the batch's device until they are asked for: reading them would wait.
        self._num_tokens, self._num_real = 0, torch.zeros(())
        self._num_labels, self._num_counted = 0, torch.zeros(())
        self._flops = torch.zeros((), dtype=torch.float64)

    def add(
        self, inputs: Mapping[str, Any], flops_per_padding: int, flops_per_ignored_label: int
    ) -> None:
        """Count a micro-batch.

        Args:
            inputs: of which `attention_mask` and `labels` are read.
            flops_per_padding: what a token of padding saves.
            flops_per_ignored_label: what a token saves whose label is ignored.
        """
        mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:  # of packed rows (packing.py)
            diagonal = mask.diagonal(dim1=-2, dim2=-1)  # padding doesn't see itself
            mask = diagonal if mask.dtype is torch.bool else diagonal == 0
        if isinstance(mask, torch.Tensor):
            num_real = (mask != 0).sum()
            self._num_tokens += mask.numel()
            self._num_real = self._num_real.to(mask.device) + num_real
            avoided = flops_per_padding * (mask.numel() - num_real).double()
            self._flops = self._flops.to(mask.device) + avoided
        if isinstance(labels, torch.Tensor):
            num_counted = (labels != IGNORED_LABEL).sum()
            self._num_labels += labels.numel()
            self._num_counted = self._num_counted.to(labels.device) + num_counted
            avoided = flops_per_ignored_label * (labels.numel() - num_counted).double()
            self._flops = self._flops.to(labels.device) + avoided

    def take_window(self) -> dict[str, float]:
        """Since the last call, of this rank: `token_density` and `label_density`, shares of the
        tokens that aren't padding and whose label counts, and `tflops_avoided`, 10^12 FLOPs of
        matrix products, forward and backward. Then starts anew."""
        window = {}
        if self._num_tokens:
            window["token_density"] = round(float(self._num_real) / self._num_tokens, 4)
        if self._num_labels:
            window["label_density"] = round(float(self._num_counted) / self._num_labels, 4)
        if window:
            window["tflops_avoided"] = round(float(self._flops) / 1e12, 6)
        self._start_window()
        return window
