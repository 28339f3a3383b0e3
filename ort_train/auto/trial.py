"""The trial of `backend="auto"`: candidates that agree with eager, timed in turns."""

from __future__ import annotations

import gc
import itertools
import logging
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ort_train.auto.candidates import (
    CONCRETE_BACKENDS,
    Candidate,
    densities,
    no_bf16,
    precisions,
    sparser,
)
from ort_train.auto.probe import Call, distance, probe, step, untouched
from ort_train.backends import available, runner_factory
from ort_train.ortmodule.kernels import openmp
from ort_train.ortmodule.options import SPARSITY

if TYPE_CHECKING:
    from ort_train.ortmodule import OrtOptions

logger = logging.getLogger(__name__)

#: Timed passes over the trial batches, the candidates taking turns.
NUM_ROUNDS = 3
#: Rounds while another candidate may be as fast as the leader, and the seconds that the further
#: ones take: of short steps there are more, as each of them says less.
MAX_ROUNDS = 15
MIN_FURTHER_S, MAX_FURTHER_S = 2.0, 30.0
# What may separate the choice from the best: a candidate that came this near to the leader in a
# fifth of the rounds isn't decided yet.
_CLOSE = 1.03
# Leaving out costs some copies of the activations: above this density that may be more than it
# brings, so it is also tried without.
_DENSE = 0.9
# fp32 sums in another order differ in the last bits; a wrong graph differs by orders more.
_LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
_GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-1, "fp16": 5e-2}
# Gradients in bf16 are compared with eager's in fp32 where both are tried; they may be this much
# farther than autocast's (which are rounded in other places).
_AUTOCAST_FACTOR = 2.0
# Dropout draws other masks in every backend: allow a few times what eager differs from itself.
_NOISE_FACTOR = 5.0


@dataclass(frozen=True)
class Decision:
    """What `auto` chose.

    Attributes:
        backend: the one that training goes on with.
        precision: the one that it computes in.
        sparsity: the options that leave tokens out, those of the user among them.
        step_ms: median time of forward and backward of each candidate that ran and agreed.
        rejected: why each other candidate was left out, in a line.
        cost_s: what the trial took, compilation and export included.
    """

    backend: str
    precision: str
    sparsity: tuple[str, ...]
    step_ms: dict[str, float]
    rejected: dict[str, str]
    cost_s: float

    def __str__(self) -> str:
        chosen = Candidate(self.backend, self.precision, self.sparsity)
        times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in self.step_ms.items())
        left_out = "".join(
            f"; {name} left out: {_first_sentence(why)}" for name, why in self.rejected.items()
        )
        return f"backend auto: {chosen} ({times} a step; trial {self.cost_s:.1f} s{left_out})"


def _first_sentence(reason: str) -> str:
    """Without what comes after: ways out are of no use to who has another candidate."""
    return re.split(r"[.;]\s", reason, maxsplit=1)[0].rstrip(".")


class Trial:
    """Which candidate runs a module's training calls fastest.

    Backends are tried in each precision first, then the fastest of backend ort with what it may
    leave out. Every rank of a distributed run comes to the same decision.

    Args:
        module: whose parameters are trained; left as it is.
        original: its own forward.
        calls: what is tried.
        precision: "fp32", "bf16" or "fp16", or "auto" for those that the hardware has.
        options: the user's for backend ort.
        loss_only: nothing but the loss of a call's result is read, so that backend ort may leave
            tokens out.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        original: Callable[..., Any],
        calls: Sequence[Call],
        *,
        precision: str,
        options: OrtOptions,
        loss_only: bool = False,
    ):
        self._module = module
        self._original = original
        self._calls = calls
        self._precisions = precisions(precision)
        self._options = options
        self._loss_only = loss_only
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._eager = Candidate("eager", self._precisions[0])
        self._autocast_distance: float | None = None
        self._runners: dict[Candidate, Callable[..., Any]] = {}
        self._step_ms: dict[Candidate, float] = {}
        self._rejected: dict[str, str] = {}

    def run(self) -> tuple[Decision, Callable[..., Any]]:
        """Try all candidates.

        Returns:
            the decision, and what runs its training calls
        """
        started = time.perf_counter()
        with untouched(self._module, self._device):
            run = self._make_runner(self._eager)
            self._reference = probe(self._module, run, self._calls)
            self._noise = distance(probe(self._module, run, self._calls), self._reference)
            self._runners[self._eager] = run
            for precision in self._precisions:
                candidates = [Candidate(name, precision) for name in CONCRETE_BACKENDS]
                self._admit([each for each in candidates if each != self._eager])
                self._measure()
            if self._loss_only:
                self._admit_sparser()
                self._measure()
        chosen = min(self._runners, key=self._step_ms.__getitem__)
        runner = self._runners[chosen]
        self._runners = {}
        gc.collect()  # the other graphs' memory
        decision = Decision(
            chosen.backend,
            chosen.precision,
            self._sparsity(chosen),
            {str(candidate): ms for candidate, ms in self._step_ms.items()},
            self._rejected,
            time.perf_counter() - started,
        )
        return decision, runner

    def _sparsity(self, candidate: Candidate) -> tuple[str, ...]:
        if candidate.backend != "ort":
            return ()
        options = candidate.options(self._options)
        return tuple(name for name in SPARSITY if getattr(options, name))

    # --- who takes part

    def _admit(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Make, run and compare candidates; returns those that every rank can run."""
        reasons: dict[Candidate, str] = {}
        for candidate in candidates:
            if reason := self._rejection(candidate):
                reasons[candidate] = reason
        votes = [float(candidate not in reasons) for candidate in candidates]
        common = _among_ranks(votes, self._device, "min")
        for candidate, vote in zip(candidates, common, strict=True):
            if not vote:
                self._runners.pop(candidate, None)
                why = reasons.get(candidate, "another rank can't run it")
                self._rejected[str(candidate)] = why.split("\n", 1)[0]
                logger.debug("%s left out: %s", candidate, why)
        return [candidate for candidate in candidates if candidate in self._runners]

    def _rejection(self, candidate: Candidate) -> str | None:
        """Why a candidate is left out; None where it runs, and agrees."""
        can_run, reason = available(candidate.backend, candidate.precision, self._device.type)
        if not can_run:
            return reason
        # torch's own kernels do what they can where bf16 is all that was asked for.
        is_asked_for = candidate.backend != "ort" and len(self._precisions) == 1
        if (
            candidate.precision == "bf16"
            and not is_asked_for
            and (missing := no_bf16(self._device.type))
        ):
            return missing
        try:
            run = self._make_runner(candidate)
            found = probe(self._module, run, self._calls)
        except Exception as error:
            return str(error).strip() or type(error).__name__
        loss, gradient = distance(found, self._reference)
        loss_limit, gradient_limit = self._limits(candidate)
        # Written so that a NaN is a disagreement.
        if not (loss <= loss_limit and gradient <= gradient_limit):
            return f"disagrees with {self._eager} (loss by {loss:.1e}, gradients by {gradient:.1e})"
        if candidate.backend == "eager" and candidate.precision != self._precisions[0]:
            self._autocast_distance = gradient
        self._runners[candidate] = run
        return None

    def _make_runner(self, candidate: Candidate) -> Callable[..., Any]:
        options = candidate.options(self._options)
        make = runner_factory(candidate.backend, candidate.precision, options)
        return make(self._module, self._original)

    def _limits(self, candidate: Candidate) -> tuple[float, float]:
        """How far loss and gradients may be from the reference's."""
        gradient = _GRADIENT_TOLERANCE[candidate.precision]
        if candidate.precision != self._precisions[0] and self._autocast_distance is not None:
            autocast = _AUTOCAST_FACTOR * self._autocast_distance
            gradient = min(gradient, autocast + _GRADIENT_TOLERANCE[self._precisions[0]])
        loss_noise, gradient_noise = (_NOISE_FACTOR * noise for noise in self._noise)
        return _LOSS_TOLERANCE[candidate.precision] + loss_noise, gradient + gradient_noise

    def _admit_sparser(self) -> None:
        """The fastest of backend ort with what it may leave out, where that could win."""
        dense = [candidate for candidate in self._step_ms if candidate.backend == "ort"]
        found = densities(self._original, self._calls)
        density = dict(zip(found, _among_ranks(found.values(), self._device, "mean"), strict=True))
        if not dense:
            return
        best = min(dense, key=self._step_ms.__getitem__)
        fastest_ms = min(self._step_ms.values())
        candidates = [
            candidate
            for candidate in sparser(best, self._options, density)
            # At most all work on the tokens that are left out is saved.
            if self._step_ms[best] * min(density[n] for n in candidate.sparsity) < fastest_ms
        ]
        if not candidates:
            return
        most, *fewer = candidates
        if self._admit([most]):
            fewer = [
                candidate
                for candidate in fewer
                if all(density[n] > _DENSE for n in set(most.sparsity) - set(candidate.sparsity))
            ]
        self._admit(fewer)

    # --- how fast they are

    def _measure(self) -> None:
        """Time all that take part, in turns, and let go of all but the fastest."""
        if all(candidate in self._step_ms for candidate in self._runners):
            return
        samples: dict[Candidate, list[float]] = {candidate: [] for candidate in self._runners}
        contenders = list(self._runners)
        began, spent_s = 0.0, 0.0
        for num_rounds in itertools.count():
            if num_rounds >= NUM_ROUNDS:
                contenders = _contenders(samples, contenders)
                has_enough = num_rounds >= MAX_ROUNDS and spent_s >= MIN_FURTHER_S
                if len(contenders) == 1 or has_enough or spent_s > MAX_FURTHER_S:
                    break
            if num_rounds == NUM_ROUNDS:
                began = time.perf_counter()
            # From another one on in each round, so that none always follows the same one.
            first = num_rounds % len(contenders)
            order = contenders[first:] + contenders[:first]
            times = {candidate: self._round_ms(candidate) for candidate in order}
            elapsed_s = time.perf_counter() - began if began else 0.0
            *shared, spent_s = _among_ranks(
                [*(times[c] for c in contenders), elapsed_s], self._device, "mean"
            )
            for candidate, ms in zip(contenders, shared, strict=True):
                samples[candidate].append(ms)
        self._step_ms |= {c: statistics.median(times) for c, times in samples.items()}
        # The others' memory is given back before the next candidates come.
        self._runners = {candidate: self._runners[candidate] for candidate in contenders}

    def _round_ms(self, candidate: Candidate) -> float:
        """Mean time of a step over the calls."""
        return statistics.mean(self._timed_ms(candidate, call) for call in self._calls)

    def _timed_ms(self, candidate: Candidate, call: Call) -> float:
        openmp.wake()  # whatever the candidate before asked for
        self._synchronize()
        started = time.perf_counter()
        step(self._module, self._runners[candidate], call)
        self._synchronize()
        return (time.perf_counter() - started) * 1e3

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _contenders(
    samples: dict[Candidate, list[float]], candidates: Sequence[Candidate]
) -> list[Candidate]:
    """The leader and those that came near to it in a fifth of the rounds."""
    leader = min(candidates, key=lambda c: statistics.median(samples[c]))
    near = []
    for candidate in candidates:
        # Rounds are paired, because what slows the machine for a while slows all of a round.
        ratios = sorted(
            ours / theirs for ours, theirs in zip(samples[candidate], samples[leader], strict=True)
        )
        if ratios[len(ratios) // 5] < _CLOSE:
            near.append(candidate)
    return near


def _among_ranks(values: Any, device: torch.device, how: str) -> list[float]:
    """Each value's mean or minimum over the ranks, so that all decide alike."""
    values = list(values)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    shared = torch.tensor(values, dtype=torch.float64 if device.type == "cpu" else None).to(device)
    is_mean = how == "mean"
    kind = torch.distributed.ReduceOp.SUM if is_mean else torch.distributed.ReduceOp.MIN
    torch.distributed.all_reduce(shared, kind)
    return (shared / torch.distributed.get_world_size() if is_mean else shared).tolist()
