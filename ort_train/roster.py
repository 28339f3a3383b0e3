"""The ranks of a launch by name: which of them has died, and which doesn't answer."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

from ort_train.distributed import rank
from ort_train.errors import RankError

#: How long a rank whose connection broke waits for the others to say that theirs did, too. All of
#: them wait in the same operation, so they come to its end within a step's time of one another.
_GRACE_S = 10.0
_POLL_S = 0.2
_ENDED = ("gone", psutil.STATUS_ZOMBIE)
_SUSPENDED = psutil.STATUS_STOPPED


@dataclass
class _Reports:
    ranks: set[int]
    store_answered: bool


class Roster:
    """Where each rank of the process group lives, so that a lost or silent one can be named.

    Collective where there is a process group. A rank whose connection breaks says so in the store
    that the ranks met at; who doesn't is the cause.
    """

    def __init__(self) -> None:
        self._members: list[tuple[str, int]] = [(socket.gethostname(), os.getpid())]
        self._store = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            members: list[tuple[str, int]] = [("", 0)] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(members, self._members[0])
            self._members = members
            self._store = torch.distributed.distributed_c10d._get_default_store()

    @contextlib.contextmanager
    def watched(self, way_out: str) -> Iterator[None]:
        """Turn a broken connection to another rank into an error that names the rank.

        Raises:
            RankError: in place of what torch.distributed raised.
        """
        try:
            yield
        except RuntimeError as error:
            if len(self._members) == 1 or not is_broken_connection(error):
                raise
            raise RankError(f"rank {rank()} stops: {self._cause(error)}. {way_out}") from error

    def _cause(self, error: RuntimeError) -> str:
        reports = self._wait_for_reports()
        missing = [n for n in range(len(self._members)) if n not in reports.ranks]
        states = {n: self._state(n) for n in missing}
        if dead := [n for n in missing if states[n] in _ENDED]:
            return f"{_named(dead)} {'has' if len(dead) == 1 else 'have'} died"
        suspended = [n for n in missing if states[n] == _SUSPENDED]
        if not (suspended or reports.store_answered):
            return (
                "the store that the ranks met at doesn't answer: the process of rank 0 or its "
                f"launcher, on {self._members[0][0]}, hangs, or that host is lost"
            )
        if not missing:
            return f"a connection between the ranks broke, though all of them live ({error})"
        silent = suspended or missing
        where = ", ".join(f"process {self._members[n][1]} on {self._members[n][0]}" for n in silent)
        who = f"{_named(silent)} ({where}) {'has' if len(silent) == 1 else 'have'}"
        if not _is_timeout(error):
            return f"{who} died or can't be reached; the output there says why"
        why = "suspended" if suspended else "hanging, or the host is lost"
        return f"{who} not answered in time (train.ddp_timeout_s): {why}"

    def _wait_for_reports(self) -> _Reports:
        """What the others say within the grace, or until each has spoken or can't any more."""
        reports = _Reports({rank()}, store_answered=False)
        others = [n for n in range(len(self._members)) if n != rank()]
        if (store := self._store) is None:
            return reports
        deadline = time.monotonic() + _GRACE_S

        def ask() -> None:
            with contextlib.suppress(RuntimeError):  # the store went with the rank that held it
                store.set(_key(rank()), "")
                while time.monotonic() < deadline:
                    reports.ranks.update(n for n in others if store.check([_key(n)]))
                    reports.store_answered = True
                    time.sleep(_POLL_S)

        # A thread that can be left behind: a store in a suspended process never answers.
        threading.Thread(target=ask, daemon=True).start()
        while time.monotonic() < deadline:
            time.sleep(_POLL_S)
            waited_for = [n for n in others if n not in reports.ranks]
            if all(self._state(n) in (*_ENDED, _SUSPENDED) for n in waited_for):
                break
        return reports

    def _state(self, number: int) -> str | None:
        """psutil's word for a rank's process, "gone" without one, None on another host."""
        host, pid = self._members[number]
        if host != socket.gethostname():
            return None
        try:
            return str(psutil.Process(pid).status())
        except psutil.NoSuchProcess:
            return "gone"


def _key(number: int) -> str:
    return f"ort_train/connection_broke/{number}"


def _named(numbers: list[int]) -> str:
    return f"rank{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


def _is_timeout(error: RuntimeError) -> bool:
    return any(words in str(error).lower() for words in ("timed out", "timeout"))


def is_broken_connection(error: RuntimeError) -> bool:
    """gloo's words, and the types of torch's errors about NCCL and the store."""
    kinds = tuple(
        kind
        for name in ("DistBackendError", "DistNetworkError", "DistStoreError")
        if isinstance(kind := getattr(torch.distributed, name, None), type)
    )
    if isinstance(error, kinds):
        return True
    text = str(error).lower()
    return any(
        words in text for words in ("closed by peer", "connection reset", "broken pipe", "gloo/")
    )
