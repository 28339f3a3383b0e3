"""The worker's end of a benchmark: answers the requests of `process.Worker`.

Needs nothing but the standard library, so that a worker may run in another environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ort_train.errors import BackendUnavailableError, OrtTrainError, UnsupportedModelError


def serve(make_session: Callable[..., Any]) -> int:
    """Answer requests until `finish` or the end of stdin.

    Args:
        make_session: makes, of the arguments of `prepare`, an object with `start()`,
            `round(**arguments)` and `finish()`, each of which returns a reply.
    """
    # Libraries print: what they write to stdout must not get between the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    session: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("request")
        try:
            if name == "prepare":
                session = make_session(**request)
                reply = session.start()
            else:
                assert session is not None, "`prepare` comes first"
                reply = session.round(**request) if name == "round" else session.finish()
        except Exception as error:
            import traceback

            traceback.print_exc()
            # A user's error speaks for itself; of any other the type is half of the message.
            told = str(error) if isinstance(error, OrtTrainError) else _one_line(error)
            unavailable = isinstance(error, BackendUnavailableError | UnsupportedModelError)
            reply = {"error": told, "unavailable": unavailable}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
        if name == "finish":
            break
    return 0


def peak_resident_gib() -> float:
    """The largest resident set of this process so far."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20  # kB
    except OSError:
        pass
    import resource

    # Not first: Linux hands a child the parent's maximum. Bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
