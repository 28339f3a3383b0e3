"""Ending early, and losing nothing: a signal saves a checkpoint at the end of the current step,
before the first one it ends the job at once.

Schedulers send one before they take a machine away: Slurm SIGUSR1 (`--signal=USR1@300`) and
SIGTERM, Kubernetes SIGTERM. The job then ends with `StoppedBySignal.EXIT_CODE`, on which its job
file puts it back into the queue; `output.resume=auto` continues it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from ort_train.errors import StoppedBySignal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """While there is nothing to save.

    Raises:
        StoppedBySignal: when a signal comes.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal(
            f"{signal.Signals(number).name} ended the job before its first step: there is nothing "
            "to save, start it again as it was"
        )

    with _handled_by(end):
        yield


@contextlib.contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """The signals call this function meanwhile."""
    is_main = threading.current_thread() is threading.main_thread()  # the only one Python allows
    previous = {number: signal.signal(number, handle) for number in SIGNALS} if is_main else {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopOnSignal(TrainerCallback):
    """Ends training with a checkpoint, on all ranks at the same step, when any got a signal.

    A context manager: inside of it the signals only leave a note.
    """

    def __init__(self) -> None:
        #: The signal's name, once this rank got one.
        self.received: str | None = None
        #: Whether training was ended for a signal, here or on another rank.
        self.stopped = False
        self._handled = contextlib.ExitStack()

    def __enter__(self) -> StopOnSignal:
        self._handled.enter_context(_handled_by(self._note))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._handled.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def error(self, state: Any) -> StoppedBySignal:
        """What the job raises when training has been `stopped`."""
        return StoppedBySignal(
            f"{self.received or 'a signal to another rank'} ended the run after step "
            f"{state.global_step} of {state.max_steps}; checkpoint-{state.global_step} is saved: "
            "continue with output.resume=auto"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not _any_rank(self.received is not None, args.device):
            return
        if state.global_step >= state.max_steps:  # done anyway: the job goes on to its end
            return
        self.stopped = True
        control.should_save = True
        control.should_training_stop = True


def _any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank. Collective."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags.item())
