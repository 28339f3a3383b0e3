"""A training's progress bar and log lines on the terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class ConsoleCallback(TrainerCallback):
    """One progress bar on stderr, and a readable line a log above it; main process only."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step",
                dynamic_ncols=True,
            )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line = describe(logs, state.global_step, state.max_steps)
        if line:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def describe(logs: dict[str, Any], step: int, max_steps: int) -> str:
    """A log of transformers' Trainer in one line, or "" for one that says nothing new."""
    if "loss" in logs:
        parts = [f"step {step}/{max_steps}", f"loss {logs['loss']:.4f}"]
        if "it_per_s" in logs:
            parts.append(f"{logs['it_per_s']:.2f} it/s")
        if "tokens_per_s" in logs:
            parts.append(f"{logs['tokens_per_s']:,.0f} tokens/s")
        parts += [
            f"{value:.2f}x {name.removeprefix('x_')}"
            for name, value in logs.items()
            if name.startswith("x_")
        ]
        return "  ".join(parts)
    if "eval_loss" in logs:
        return f"step {step}/{max_steps}  evaluation loss {logs['eval_loss']:.4f}"
    return ""
