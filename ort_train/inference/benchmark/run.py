"""A case of prompts and generation on its way from a fresh process to an entry of the record."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ort_train.bench.parity import finite
from ort_train.bench.process import Worker
from ort_train.bench.turns import CaseRun, paired_ratios, short, spread
from ort_train.inference.benchmark.engines import ENGINES, REFERENCE

# A token may be another where eager's own logits are this close: each of the two may be off by five
# times the rms of the differences, which one of some 30,000 normal ones hardly exceeds.
_TIE = 10.0


@dataclass(frozen=True)
class Case:
    """An engine, rows of a batch, tokens of each prompt."""

    engine: str
    batch_size: int
    prompt_len: int

    def __str__(self) -> str:
        return f"{self.engine} {self.batch_size}x{self.prompt_len}"


@dataclass
class Run(CaseRun):
    """A case of prompts and generation; `config` is what its worker is told.

    Attributes:
        on_own_weights: eager on the rounded weights of this engine, which it is held against.
    """

    python: str = sys.executable
    on_own_weights: Run | None = None

    @property
    def outputs(self) -> Path:
        return self.files / "outputs.npz"

    def start_worker(self, timeout_s: float) -> Worker:
        is_llamacpp = ENGINES[self.case.engine].runs_in == "llamacpp"
        module = "llamacpp_worker" if is_llamacpp else "worker"
        command = [self.python, "-m", f"ort_train.inference.benchmark.{module}"]
        return Worker(self.files, timeout_s, command)

    def run_once(self, folder: Path, timeout_s: float) -> None:
        """One prompt and generation, for its outputs alone."""
        folder.mkdir()
        try:
            self.prepare(folder, timeout_s)
            if self.status == "ok":
                self.finish()
        finally:
            self.kill()

    def request(self) -> dict[str, Any]:
        return {"engine": self.case.engine, "outputs": str(self.outputs), **self.config}

    def compare(self, reference: CaseRun) -> str | None:
        assert isinstance(reference, Run)
        tolerance = ENGINES[self.case.engine].tolerance
        own = self.on_own_weights or reference
        if own.status != "ok":
            return f"nothing to compare with: eager on its weights is {own.status}: {own.reason}"
        with np.load(self.outputs) as ours, np.load(own.outputs) as theirs:
            self.parity, problem = compare(dict(ours), dict(theirs), tolerance)
            if own is not reference:
                with np.load(reference.outputs) as original:
                    rounding = _distance(theirs["logits"], original["logits"])
                self.parity["rounding_rel"] = finite(rounding)
        return problem


def compare(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float
) -> tuple[dict[str, Any], str | None]:
    """Hold an engine's logits and greedy tokens against eager's.

    Args:
        ours: `logits` (B, V) after the prompts, and `tokens` (B, N).
        theirs: also `candidates` and `values` (B, N, K): eager's highest logits of each step.
        tolerance: of the rms of the logits' differences, over the standard deviation of eager's.

    Returns:
        The record's parity section, and what exceeds the tolerance (None: nothing does).
    """
    deviation = float(theirs["logits"].std())
    error = _distance(ours["logits"], theirs["logits"])
    equal = np.cumprod(ours["tokens"] == theirs["tokens"], axis=1).sum(axis=1)
    parity = {
        "logits_rel": finite(error),
        "tolerance": tolerance,
        "equal_tokens": [int(number) for number in equal],
    }
    # Written so that a NaN, which compares false with everything, is a problem.
    if not error <= tolerance:
        return parity, (
            f"logits after the prompt differ by {error:.2g} of their deviation (allowed "
            f"{tolerance:g})"
        )
    for row, step in enumerate(equal):
        if step == ours["tokens"].shape[1]:
            continue
        token = int(ours["tokens"][row, step])
        candidates, values = theirs["candidates"][row, step], theirs["values"][row, step]
        near = values[candidates == token]
        gap = (values.max() - near[0]) / deviation if near.size else float("inf")
        if not gap <= _TIE * tolerance:
            return parity, (
                f"token {step + 1} generated in row {row + 1} is {token}, whose logit is "
                f"{gap:.2g} deviations below that of eager's choice (allowed {_TIE * tolerance:g})"
            )
    return parity, None


def _distance(ours_BV: np.ndarray, theirs_BV: np.ndarray) -> float:
    """The rms of the logits' differences, over the standard deviation of theirs."""
    return float(np.sqrt(np.mean((ours_BV - theirs_BV) ** 2)) / theirs_BV.std())


def speeds(run: Run, new_tokens: int) -> str:
    """A run's last round, in words."""
    last, rows = run.rounds[-1], run.case.batch_size
    prompt = rows * run.case.prompt_len / np.median(last["prompt_s"])
    generation = rows * new_tokens / last["generate_s"][0]
    return f"prompt {prompt:,.0f} tokens/s, generation {generation:,.1f} tokens/s"


def result(run: Run, runs: Sequence[Run], new_tokens: int) -> dict[str, Any]:
    """The record's entry of one run."""
    case = run.case
    entry: dict[str, Any] = {
        "engine": case.engine,
        "batch_size": case.batch_size,
        "prompt_len": case.prompt_len,
        "status": run.status,
        "reason": run.reason,
        "reference_only": run.reference_only,
    }
    if run.status not in ("ok", "mismatch"):
        return entry
    prompt_s, generate_s = np.array(run.series("prompt_s")), np.array(run.series("generate_s"))
    entry |= {
        "load_s": short(run.prepared["load_s"]),
        "peak_gib": None if run.peak_gib is None else short(run.peak_gib),
        "parity": run.parity,
        "prompt_tokens_per_s": spread(case.batch_size * case.prompt_len / prompt_s),
        "generate_tokens_per_s": spread(case.batch_size * new_tokens / generate_s),
        "prompt_ms": spread(prompt_s * 1e3),
        "token_ms": spread(generate_s / new_tokens * 1e3),
        "speedups": {},
    }
    for baseline in (REFERENCE, *ENGINES[case.engine].baselines):
        other = _find(runs, Case(baseline, case.batch_size, case.prompt_len))
        prompt = paired_ratios(run, other, "prompt_s")
        generation = paired_ratios(run, other, "generate_s")
        if prompt is not None and generation is not None:
            entry["speedups"][baseline] = {
                "prompt": spread(prompt),
                "generation": spread(generation),
            }
    return entry


def _find(runs: Sequence[Run], case: Case) -> Run | None:
    return next((run for run in runs if run.case == case), None)
