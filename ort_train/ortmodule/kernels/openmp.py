"""OpenMP's threads, which torch uses, on the cores that ONNX Runtime's pool uses, too.

An idle thread that spins finds the next operator at once; one that sleeps is woken in some 60 us.
But ONNX Runtime's threads spin for 20 ms after an operator and those of GNU's OpenMP for 4 ms:
where both do, one pool's take the cores from the other's. So ONNX Runtime's sleep, unless
`OrtOptions.allow_spinning` is set; then OpenMP's do.

libgomp reads how long to spin when it is loaded, but spins for microseconds only while a process
has more OpenMP threads than it has cores (GOMP_SPINCOUNT in its manual). So a thread of ours holds
a team of so many, asleep.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
import time
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

#: How long OpenMP's threads don't spin after a training step began: what follows a training, such
#: as an evaluation, is slowed for a moment only.
QUIET_S = 0.5


class _Team(threading.Thread):
    """Holds a team of as many OpenMP threads as there are cores, until nobody renewed it."""

    def __init__(self, libgomp: ctypes.CDLL):
        super().__init__(name="ort_train_openmp", daemon=True)
        self._libgomp = libgomp
        self._started = threading.Event()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._until_s = time.monotonic() + QUIET_S

    def hold(self) -> None:
        self.start()
        self._started.wait()

    def renew(self) -> bool:
        """Hold it for `QUIET_S` from now on; False where it ended already."""
        with self._lock:
            self._until_s = time.monotonic() + QUIET_S
            return not self._ended.is_set()

    def end(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        do_nothing = ctypes.CDLL(None).free  # with a null pointer
        # Beside the thread that starts it, so there are more than cores, whatever torch has.
        num_threads = len(os.sched_getaffinity(0)) + 1
        self._libgomp.GOMP_parallel(do_nothing, None, num_threads, 0)
        self._started.set()
        while (left_s := self._left_s()) > 0:
            self._ended.wait(left_s)
        # The team ends with the thread that started it.

    def _left_s(self) -> float:
        with self._lock:
            left_s = self._until_s - time.monotonic()
            if left_s <= 0:
                self._ended.set()
            return 0.0 if self._ended.is_set() else left_s


_team: _Team | None = None


def quiet() -> None:
    """Have OpenMP's idle threads sleep for the next `QUIET_S`."""
    global _team
    if _team is not None and _team.renew():
        return
    libgomp = _libgomp()
    if libgomp is not None and torch.get_num_threads() > 1:
        _team = _Team(libgomp)
        _team.hold()


def wake() -> None:
    """Have OpenMP's idle threads spin again."""
    global _team
    if _team is not None:
        _team.end()
        _team = None


@functools.cache
def _libgomp() -> ctypes.CDLL | None:
    """torch's, or None where another library is its OpenMP."""
    folder = Path(torch.__file__).resolve().parent  # an environment may be a link
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if "libgomp" in path and folder in Path(path).parents:
            return ctypes.CDLL(path)
    logger.warning(
        "allow_spinning: torch's OpenMP isn't libgomp, and its idle threads go on spinning beside "
        "ONNX Runtime's; set its own variable (KMP_BLOCKTIME=0 for Intel's) or leave it off"
    )
    return None
