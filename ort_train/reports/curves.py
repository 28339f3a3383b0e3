"""A training's loss and speed over its steps, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot(log_history: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draw loss (training and evaluation) and iterations/s against the step.

    Args:
        log_history: of transformers' TrainerState.
        path: .png or .svg; replaced whole.
        title: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ort_train.files import replacing

    def series(name: str) -> tuple[list[int], list[float]]:
        rows = [(log["step"], log[name]) for log in log_history if name in log]
        return [step for step, _ in rows], [value for _, value in rows]

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    losses, speeds = figure.subplots(1, 2)
    losses.plot(*series("loss"), color="#0072b2", label="training")
    eval_steps, eval_losses = series("eval_loss")
    if eval_steps:
        losses.plot(eval_steps, eval_losses, "o", color="#d55e00", label="evaluation")
        losses.legend(frameon=False)
    losses.set(xlabel="step", ylabel="loss (nats per token)")
    steps, it_per_s = series("it_per_s")
    speeds.plot(steps, it_per_s, color="#0072b2")
    speeds.set(xlabel="step", ylabel="iterations per second")
    speeds.set_ylim(0, 1.1 * max(it_per_s, default=1.0))
    for axes in (losses, speeds):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    if title:
        figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix.lstrip("."))
