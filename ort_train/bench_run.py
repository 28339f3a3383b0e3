"""A case of a benchmark on its way from a fresh process to an entry of the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ort_train.bench_process import Worker, WorkerError
from ort_train.config import RunConfig
from ort_train.parity import TOLERANCES, Tolerance, Trajectory, finite, judge


@dataclass(frozen=True)
class Case:
    """What is measured: a backend in a precision at a shape.

    Args:
        backend: eager, compile or ort.
        precision: fp32, bf16 or fp16 (the latter two by autocast).
        micro_batch_size: samples per forward; None: the recipe's.
        block_size: tokens per sample; None: the recipe's.
    """

    backend: str
    precision: str = "fp32"
    micro_batch_size: int | None = None
    block_size: int | None = None

    def __str__(self) -> str:
        return f"{self.backend} {self.precision} {self.micro_batch_size}x{self.block_size}"


@dataclass
class Run:
    """A case on its way through the benchmark.

    A stage that fails is noted in `status` and `reason`; nothing is raised.
    """

    case: Case
    config: RunConfig
    reference_only: bool = False
    status: str = "ok"
    reason: str | None = None
    worker: Worker | None = None
    gradients: Path = Path()
    prepared: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, list[float]]] = field(default_factory=list)
    peak_gib: float | None = None
    parity: dict[str, Any] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Samples per forward, tokens per sample."""
        return self.config.train.micro_batch_size, self.config.data.block_size

    def prepare(self, folder: Path, timeout_s: float, **arguments: Any) -> None:
        """Start the case's process and take it through its first and its warm-up steps."""
        # Without spaces: a compiler takes the parts of such a path for several files.
        scratch = folder / str(self.case).replace(" ", "-")
        scratch.mkdir()
        self.gradients = scratch / "gradients.safetensors"
        self.worker = Worker(scratch, timeout_s)
        config = self.config.model_dump(mode="json")
        reply = self._request("prepare", config=config, gradients=str(self.gradients), **arguments)
        self.prepared = reply or {}

    def round(self, steps: int) -> None:
        """Time some training steps."""
        if times := self._request("round", steps=steps):
            self.rounds.append(times)

    def finish(self) -> None:
        """Ask for the peak memory; the process ends."""
        if reply := self._request("finish"):
            self.peak_gib = reply["peak_gib"]

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        if self.worker is not None:
            self.worker.kill()

    def _request(self, name: str, **arguments: Any) -> dict[str, Any] | None:
        """The worker's reply, or None after its failure has been noted."""
        assert self.worker is not None
        try:
            return self.worker.request(name, **arguments)
        except WorkerError as error:
            self.status = "unavailable" if error.unavailable else "failed"
            self.reason = str(error)
            return None

    @property
    def trajectory(self) -> Trajectory:
        losses = [*self.prepared["warmup_loss"], *self.series("loss")]
        return Trajectory(self.prepared["first_loss"], losses, self.gradients)

    def series(self, name: str) -> list[float]:
        """One measurement of every step, over all rounds."""
        return [value for times in self.rounds for value in times[name]]

    def judge(self, reference: Run) -> None:
        """Pass or fail the parity gate; the files of both gradients must still be there."""
        if self.status != "ok":
            return
        problem: str | None
        if reference.status != "ok":
            problem = f"nothing to compare with: {reference.case} is {reference.status}"
        elif self.prepared["batches"] != reference.prepared["batches"]:
            problem = f"its data differs from that of {reference.case}: {self.prepared['data']}"
        else:
            tolerance = _tolerance(self.config)
            self.parity, problem = judge(self.trajectory, reference.trajectory, tolerance)
        if problem:
            self.status, self.reason = "mismatch", problem


def _tolerance(config: RunConfig) -> Tolerance:
    """Of the narrowest numbers that the case computes with."""
    weights = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[config.model.dtype]
    precision = config.train.precision
    return TOLERANCES[weights if precision == "fp32" else precision]


def result(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """The record's entry of one run."""
    case = run.case
    entry: dict[str, Any] = {
        "backend": case.backend,
        "precision": case.precision,
        "micro_batch_size": case.micro_batch_size,
        "block_size": case.block_size,
        "status": run.status,
        "reason": run.reason,
        "reference_only": run.reference_only,
    }
    if run.prepared:
        entry["first_step_s"] = _short(run.prepared["first_step_s"])
        entry["loss"] = [finite(_short(loss)) for loss in run.trajectory.losses]
    if run.status not in ("ok", "mismatch"):
        return entry
    num_tokens = run.config.train.micro_batch_size * run.config.data.block_size
    step_s = np.array(run.series("step_s"))
    rate = 1 / step_s
    entry |= {
        "it_per_s": _spread(rate),
        "step_ms": _spread(step_s * 1e3),
        "forward_backward_ms": _short(np.median(run.series("forward_backward_s")) * 1e3),
        "optimizer_ms": _short(np.median(run.series("optimizer_s")) * 1e3),
        "tokens_per_s": _short(np.median(rate) * num_tokens),
        "peak_gib": None if run.peak_gib is None else _short(run.peak_gib),
        "parity": run.parity,
    }
    for baseline in ("eager", "compile"):
        ratios = _ratios(run, replace(case, backend=baseline), runs)
        if ratios is not None:
            spread = _spread(ratios)
            entry[f"speedup_vs_{baseline}"] = spread["median"]
            entry[f"speedup_vs_{baseline}_range"] = [spread["p20"], spread["p80"]]
    return entry


def _ratios(run: Run, baseline: Case, runs: Sequence[Run]) -> np.ndarray | None:
    """How many times faster than the same precision's baseline, round by round.

    Rounds are paired, because what slows the machine for a while slows both of a pair.
    """
    other = next((other for other in runs if other.case == baseline), None)
    if other is None or other.status != "ok" or run.status != "ok":
        return None
    return np.array(
        [
            np.median(theirs["step_s"]) / np.median(ours["step_s"])
            for theirs, ours in zip(other.rounds, run.rounds, strict=True)
        ]
    )


def _spread(values: np.ndarray) -> dict[str, float]:
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"median": _short(median), "p20": _short(p20), "p80": _short(p80)}


def _short(value: float) -> float:
    """Six significant digits: more are noise, and make a record hard to read."""
    return float(f"{value:.6g}")
