"""The parent's handle on one benchmark case in a fresh process (`serve.py` is its other end).

The two ends speak JSON lines: a request on the worker's stdin, one reply on its stdout. A fresh
process per case keeps compilers, thread pools, allocators and monkey patches of one backend away
from the next, and lets one that crashes or hangs be told apart from the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ort_train.errors import OrtTrainError
from ort_train.reports.provenance import PACKAGE_ROOT, scrub

COMMAND = (sys.executable, "-m", "ort_train.bench.worker")
LOG_TAIL_LINES = 12


class WorkerError(OrtTrainError, RuntimeError):
    """A case that could not be measured.

    Args:
        reason: what happened.
        unavailable: the backend can't run here at all, as opposed to having failed.
    """

    def __init__(self, reason: str, unavailable: bool = False):
        super().__init__(reason)
        self.unavailable = unavailable


class Worker:
    """The parent's handle on one worker process.

    Args:
        scratch: an empty folder for the worker's log and caches of compilers and graphs.
        timeout_s: how long one request may take before the worker is killed.
        command: what to start.
    """

    def __init__(self, scratch: Path, timeout_s: float, command: Sequence[str] = COMMAND):
        self.timeout_s = timeout_s
        self._log_path = scratch / "stderr.log"
        path = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        environment = {
            **os.environ,
            "PYTHONPATH": path,  # the same package as the parent's, from any directory
            # Cold caches: a first step that reads an earlier run's kernels or graphs says nothing.
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
            "TRITON_CACHE_DIR": str(scratch / "triton"),
            "ORT_TRAIN_GRAPH_CACHE": str(scratch / "graphs"),
        }
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,  # so that its compilers can be killed with it
            )
        self._killed = False
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def request(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its reply.

        Raises:
            WorkerError: the worker reports an error, dies, or takes longer than `timeout_s`;
                it is dead afterwards.
        """
        assert self._process.stdin is not None
        try:
            # A worker that has died already shows in the reply.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"request": name, **arguments}) + "\n")
                self._process.stdin.flush()
            reply = self._reply(name)
        except BaseException:
            self.kill()
            raise
        if "error" in reply:
            self.kill()
            raise WorkerError(scrub(reply["error"]), unavailable=reply["unavailable"])
        return reply

    def kill(self) -> None:
        """End the worker and whatever it has started. May be called again."""
        if self._killed:  # its number may be somebody else's by now
            return
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed by `kill`
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def _reply(self, name: str) -> dict[str, Any]:
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                line = self._lines.get(timeout=min(0.5, max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                # A compiler that the worker started may hold its stdout open past its death.
                if self._process.poll() is not None and self._lines.empty():
                    line = None
                elif time.monotonic() >= deadline:
                    raise WorkerError(
                        f"no answer to `{name}` within {self.timeout_s:g} s, so it was stopped"
                        + self._log_tail()
                    ) from None
                else:
                    continue
            if line is None:
                raise WorkerError(f"the process ended by {self._ending()}" + self._log_tail())
            try:
                return json.loads(line)
            except ValueError:
                raise WorkerError(f"not a reply to `{name}`: {line.strip()!r}") from None

    def _ending(self) -> str:
        code = self._process.wait(timeout=10)
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return name + (" (out of memory?)" if name == "SIGKILL" else "")

    def _log_tail(self) -> str:
        lines = self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in lines if line.strip()][-LOG_TAIL_LINES:]
        return scrub("".join(f"\n  {line}" for line in lines))
