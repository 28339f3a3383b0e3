"""A case of a benchmark on its way from a fresh process to an entry of the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ort_train.bench.parity import TOLERANCES, Tolerance, Trajectory, finite, judge
from ort_train.bench.process import Worker
from ort_train.bench.turns import CaseRun, paired_ratios, short, spread
from ort_train.config import RunConfig


@dataclass(frozen=True)
class Case:
    """What is measured: a backend in a precision at a shape.

    Args:
        backend: eager, compile, ort or ort-dense (`benchmark.DENSE`).
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
class Run(CaseRun):
    """A case of training steps."""

    case: Case
    config: RunConfig

    @property
    def shape(self) -> tuple[int, int]:
        """Samples per forward, tokens per sample."""
        return self.config.train.micro_batch_size, self.config.data.block_size

    @property
    def gradients(self) -> Path:
        """Of the first step."""
        return self.files / "gradients.safetensors"

    @property
    def trajectory(self) -> Trajectory:
        losses = [*self.prepared["warmup_loss"], *self.series("loss")]
        return Trajectory(self.prepared["first_loss"], losses, self.gradients)

    def start_worker(self, timeout_s: float) -> Worker:
        return Worker(self.files, timeout_s)

    def request(self) -> dict[str, Any]:
        return {"config": self.config.model_dump(mode="json"), "gradients": str(self.gradients)}

    def compare(self, reference: CaseRun) -> str | None:
        assert isinstance(reference, Run)
        if self.prepared["batches"] != reference.prepared["batches"]:
            return f"its data differs from that of {reference.case}: {self.prepared['data']}"
        tolerance = _tolerance(self.config)
        self.parity, problem = judge(self.trajectory, reference.trajectory, tolerance)
        return problem


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
        entry["first_step_s"] = short(run.prepared["first_step_s"])
        entry["loss"] = [finite(short(loss)) for loss in run.trajectory.losses]
    if run.status not in ("ok", "mismatch"):
        return entry
    num_tokens = run.config.train.micro_batch_size * run.config.data.block_size
    step_s = np.array(run.series("step_s"))
    rate = 1 / step_s
    entry |= {
        "it_per_s": spread(rate),
        "step_ms": spread(step_s * 1e3),
        "forward_backward_ms": short(np.median(run.series("forward_backward_s")) * 1e3),
        "optimizer_ms": short(np.median(run.series("optimizer_s")) * 1e3),
        "tokens_per_s": short(np.median(rate) * num_tokens),
        "peak_gib": None if run.peak_gib is None else short(run.peak_gib),
        "parity": run.parity,
        "profile": run.finished.get("profile"),
    }
    for baseline in ("eager", "compile", "ort-dense"):
        ratios = paired_ratios(run, _find(runs, replace(case, backend=baseline)), "step_s")
        if ratios is not None:
            found = spread(ratios)
            key = f"speedup_vs_{baseline.replace('-', '_')}"
            entry |= {key: found["median"], f"{key}_range": [found["p20"], found["p80"]]}
    return entry


def _find(runs: Sequence[Run], case: Case) -> Run | None:
    return next((run for run in runs if run.case == case), None)
