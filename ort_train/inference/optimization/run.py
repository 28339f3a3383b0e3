"""A runner of passes-bench on its way from a fresh process to an entry of the record."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ort_train.bench.process import Worker
from ort_train.bench.turns import CaseRun, short, spread
from ort_train.inference.optimization.passes import relative_difference

# Largest difference to eager over the largest output: fp32 sums in another order, a few layers.
TOLERANCE = 1e-4
#: Of the worker.
COMMAND = (sys.executable, "-m", "ort_train.inference.optimization.worker")


@dataclass(frozen=True)
class Size:
    """A model to measure."""

    model: str
    hidden: int
    heads: int

    def __str__(self) -> str:
        return f"{self.model} {self.hidden}"


@dataclass
class Run(CaseRun):
    """A runner of one size; `config` is what its worker is told."""

    def start_worker(self, timeout_s: float) -> Worker:
        return Worker(self.files, timeout_s, COMMAND)

    def request(self) -> dict[str, Any]:
        return {**self.config, "output": str(self.files / "outputs.npz")}

    def outputs(self) -> Mapping[str, np.ndarray]:
        return np.load(self.files / "outputs.npz")

    def compare(self, reference: CaseRun) -> str | None:
        assert isinstance(reference, Run)
        (expected,) = reference.outputs().values()
        self.parity = {
            variant: relative_difference(found, expected)
            for variant, found in self.outputs().items()
        }
        wrong = [name for name, difference in self.parity.items() if not difference <= TOLERANCE]
        if wrong:
            return f"{', '.join(wrong)} differ from eager by {max(self.parity.values()):.1e}"
        return None


def result(
    size: Size, runs: Sequence[Run], changes: Mapping[str, Any], cold: dict[str, Any] | None
) -> dict[str, Any]:
    """The record's entry of one size.

    Args:
        changes: what each pass did to the graph.
        cold: what timing without a warm-up shows; None where that wasn't tried.
    """
    by_name = {str(run.config["runner"]): run for run in runs}
    eager, ort = by_name["eager"], by_name["ort"]
    variants: dict[str, Any] = {}
    for name, run in by_name.items():
        if run.status != "ok":
            variants[name] = {"status": run.status, "reason": run.reason}
            continue
        for variant in run.rounds[0]:
            seconds = np.array(run.series(variant))
            entry: dict[str, Any] = {
                "status": "ok",
                "ms": spread(seconds * 1e3),
                "first_ms": short(run.prepared["first_ms"][variant]),
                "rel_diff": short(run.parity[variant]) if run.parity else 0.0,
            }
            if eager.status == "ok":
                entry["speedup_vs_eager"] = spread(_ratios(eager, "eager", run, variant))
            if name == "ort":
                level = variant.rpartition(", ")[2]
                entry["speedup_vs_original"] = spread(
                    _ratios(ort, f"original, {level}", ort, variant)
                )
            variants[variant] = entry
    return {
        "model": size.model,
        "hidden": size.hidden,
        "heads": size.heads,
        "changes": dict(changes),
        "variants": variants,
        "cold": cold,
    }


def _ratios(baseline: Run, base: str, run: Run, variant: str) -> np.ndarray:
    """How many times faster, round by round."""
    return np.array(
        [
            np.median(theirs[base]) / np.median(ours[variant])
            for theirs, ours in zip(baseline.rounds, run.rounds, strict=True)
        ]
    )
