"""Cases of a benchmark, each in a process of its own, that take turns.

Those that are to be compared live at the same time, so that a disturbance of the machine meets all
of them, and a speed-up is the median of the ratios of paired rounds.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from ort_train.bench.process import Worker, WorkerError

# Idle threads of a pool spin for some milliseconds before they sleep: they must not take the
# cores of the worker whose turn comes next.
SETTLE_S = 0.1


@dataclass
class CaseRun:
    """A case on its way through a benchmark.

    A stage that fails is noted in `status` and `reason`; nothing is raised.

    Attributes:
        case: what is measured; its text names it.
        config: what the worker is told.
        reference_only: run as the parity reference, not asked for.
        prepared: the worker's reply to `prepare`.
        rounds: its replies to `round`: lists of seconds and other series, by name.
        finished: its reply to `finish`.
        files: a folder for what a worker leaves for the comparison; there until all are judged.
    """

    case: Any
    config: Any
    reference_only: bool = False
    status: str = "ok"
    reason: str | None = None
    worker: Worker | None = None
    prepared: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    peak_gib: float | None = None
    parity: dict[str, Any] | None = None
    finished: dict[str, Any] = field(default_factory=dict)
    files: Path = Path()

    def prepare(self, folder: Path, timeout_s: float, **arguments: Any) -> None:
        """Start the case's process and take it to where its rounds begin."""
        # Without spaces: a compiler takes the parts of such a path for several files.
        self.files = folder / str(self.case).replace(" ", "-")
        self.files.mkdir()
        self.worker = self.start_worker(timeout_s)
        self.prepared = self._request("prepare", **self.request(), **arguments) or {}

    def start_worker(self, timeout_s: float) -> Worker:
        """The process of the case."""
        raise NotImplementedError

    def request(self) -> dict[str, Any]:
        """What the case's worker is told in `prepare`, beside what all are told."""
        raise NotImplementedError

    def compare(self, reference: CaseRun) -> str | None:
        """Set `parity`; returns what exceeds the tolerance. The `files` of both are still there."""
        raise NotImplementedError

    def round(self, **arguments: Any) -> None:
        """Time one turn."""
        if times := self._request("round", **arguments):
            self.rounds.append(times)

    def finish(self) -> None:
        """Ask for the peak memory; the process ends."""
        if reply := self._request("finish"):
            self.peak_gib = reply["peak_gib"]
            self.finished = reply

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        if self.worker is not None:
            self.worker.kill()

    def series(self, name: str) -> list[float]:
        """One measurement, over all rounds."""
        return [value for times in self.rounds for value in times[name]]

    def judge(self, reference: CaseRun) -> None:
        """Pass or fail the parity gate."""
        if self.status != "ok":
            return
        if reference.status != "ok":
            problem: str | None = f"nothing to compare with: {reference.case} is {reference.status}"
        else:
            problem = self.compare(reference)
        if problem:
            self.status, self.reason = "mismatch", problem

    def _request(self, name: str, **arguments: Any) -> dict[str, Any] | None:
        """The worker's reply, or None after its failure has been noted."""
        assert self.worker is not None
        try:
            return self.worker.request(name, **arguments)
        except WorkerError as error:
            self.status = "unavailable" if error.unavailable else "failed"
            self.reason = str(error)
            return None


AnyRun = TypeVar("AnyRun", bound=CaseRun)


def take_turns(
    runs: Sequence[AnyRun],
    num_rounds: int,
    *,
    prepare: dict[str, Any],
    turn: dict[str, Any],
    prepared_line: Callable[[AnyRun], str],
    turn_line: Callable[[AnyRun], str],
    timeout_s: float,
    bar: tqdm,
    tell: Callable[[str], None],
) -> None:
    """Take the cases of one shape through all their stages.

    Args:
        runs: led by the reference.
        num_rounds: turns of each.
        prepare, turn: what every worker is told with the requests of these names.
        prepared_line, turn_line: what is told of a run after them.
        timeout_s: how long one stage of a case may take before it counts as hung.
        bar: advanced by 1 + num_rounds for each run.
        tell: called with a line of text whenever a case has come a stage further.
    """
    with _tidying_on_sigterm(), tempfile.TemporaryDirectory(prefix="ort_train-bench-") as folder:
        try:
            for run in runs:
                bar.set_description(f"{run.case}: prepare")
                run.prepare(Path(folder), timeout_s, **prepare)
                if run.status == "ok":
                    bar.update(1)
                    tell(f"{run.case}: {prepared_line(run)}")
                else:
                    bar.update(1 + num_rounds)
                    tell(f"{run.case} is {run.status}: {run.reason}")
            for number in range(num_rounds):
                for run in _rotated(runs, number):
                    if run.status != "ok":
                        continue
                    bar.set_description(f"{run.case}: round {number + 1} of {num_rounds}")
                    time.sleep(SETTLE_S)
                    run.round(**turn)
                    if run.status == "ok":
                        bar.update(1)
                        tell(f"{run.case}: round {number + 1} of {num_rounds}, {turn_line(run)}")
                    else:
                        bar.update(num_rounds - number)
                        tell(f"{run.case} is {run.status}: {run.reason}")
            for run in runs:
                if run.status == "ok":
                    run.finish()
            for run in runs[1:]:
                run.judge(reference=runs[0])
            runs[0].judge(reference=runs[0])  # last: the others look at its status
        finally:
            for run in runs:
                run.kill()


def until_interrupted(
    shapes: Sequence[Sequence[AnyRun]], measure: Callable[[Sequence[AnyRun]], None]
) -> bool:
    """Measure one shape after the other. Ctrl-C keeps those that were measured by then; the cases
    of the others have failed.

    Returns:
        whether it was interrupted.

    Raises:
        KeyboardInterrupt: there is nothing to keep yet.
    """
    for num_measured, runs in enumerate(shapes):
        try:
            measure(runs)
        except KeyboardInterrupt:
            if num_measured == 0:
                raise
            for run in itertools.chain.from_iterable(shapes[num_measured:]):
                if run.status == "ok":
                    run.status, run.reason = "failed", "interrupted before it was measured"
            return True
    return False


@contextlib.contextmanager
def _tidying_on_sigterm() -> Iterator[None]:
    """SIGTERM ends this process by an exception, and so its workers and their files, too."""
    is_main = threading.current_thread() is threading.main_thread()  # the only one Python allows
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield  # who has a handler of his own ends it by that
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _rotated(runs: Sequence[AnyRun], turn: int) -> Iterator[AnyRun]:
    """The runs from another one on in each turn, so that none always follows the same one."""
    for index in range(len(runs)):
        yield runs[(turn + index) % len(runs)]


def paired_ratios(run: CaseRun, baseline: CaseRun | None, series: str) -> np.ndarray | None:
    """How many times faster than a baseline, round by round, by the median of a series of seconds.

    Rounds are paired, because what slows the machine for a while slows both of a pair.

    Returns:
        None where one of the two has no numbers that count.
    """
    if baseline is None or baseline.status != "ok" or run.status != "ok":
        return None
    return np.array(
        [
            np.median(theirs[series]) / np.median(ours[series])
            for theirs, ours in zip(baseline.rounds, run.rounds, strict=True)
        ]
    )


def spread(values: np.ndarray) -> dict[str, float]:
    """Median with the 20th and 80th percentiles."""
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"median": short(median), "p20": short(p20), "p80": short(p80)}


def short(value: float) -> float:
    """Six significant digits: more are noise, and make a record hard to read."""
    return float(f"{value:.6g}")
