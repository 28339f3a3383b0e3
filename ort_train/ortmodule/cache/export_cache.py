"""Built training graphs on disk: a second start of the same run neither exports nor differentiates.

An entry is a folder, named by its key (trace_key.py): the graph as ONNX, what else a build found as
JSON, and a checksum of both. It becomes visible all at once and is read only where the checksum
holds, so there is no half entry and no damaged one: such a one is removed and built anew.

The folder is `$ORT_TRAIN_CACHE/graphs` (`~/.cache/ort_train/graphs`), or what ORT_TRAIN_GRAPH_CACHE
names, where "off" is no folder but no cache. It may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ort_train import cache
from ort_train.files import expanded

logger = logging.getLogger(__name__)

_GRAPH, _FACTS, _CHECKSUM = "graph.onnx", "facts.json", "sha256"
#: Entries that were used longest ago are removed beyond this.
MAX_BYTES = 2 * 2**30
#: A graph beyond this holds constants (buffers, tables) that would push all others out.
MAX_ENTRY_BYTES = 2**28
#: How long another rank's build is waited for. Then this one builds by itself: its forward may be
#: what the other waits for.
WAIT_S = 120.0


@dataclass(frozen=True)
class Entry:
    """A built graph.

    Attributes:
        graph: serialized onnx.ModelProto.
        facts: what else the build found, as JSON values.
    """

    graph: bytes
    facts: dict[str, Any]


_VARIABLE = "ORT_TRAIN_GRAPH_CACHE"


def is_off() -> bool:
    """Whether the environment asks for no cache."""
    return os.environ.get(_VARIABLE) == "off"


def folder() -> Path:
    """Where graphs are kept; bench's workers have one of their own."""
    own = os.environ.get(_VARIABLE)
    return expanded(own) if own else cache.root() / "graphs"


@contextlib.contextmanager
def locked(key: str) -> Iterator[bool]:
    """Keep other processes from building the same graph meanwhile; those wait here.

    Yields whether the cache can be used: not where its folder can't be written, or where another
    process has been building for longer than :data:`WAIT_S`.
    """
    lock = None
    try:
        folder().mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder() / f"{key}.lock", timeout=WAIT_S)
        lock.acquire()
    except Timeout:
        logger.warning("another process builds this graph since %.0f s: not waited for", WAIT_S)
        lock = None
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        logger.warning("built graphs aren't cached in %s: %s", folder(), error)
        lock = None
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def load(key: str) -> Entry | None:
    """The entry, or None where there is none or it is damaged, in which case it is removed."""
    path = folder() / key
    if not path.is_dir():
        return None
    try:
        graph, facts = (path / _GRAPH).read_bytes(), (path / _FACTS).read_bytes()
        if (path / _CHECKSUM).read_text() != _checksum(graph, facts):
            raise ValueError("its checksum doesn't match")
        entry = Entry(graph, json.loads(facts))
        os.utime(path)  # used last
    except (OSError, ValueError) as error:
        discard(key, str(error))
        return None
    return entry


def discard(key: str, reason: str) -> None:
    """Remove a damaged entry."""
    logger.warning("the cached graph %s is damaged (%s): it is built anew", folder() / key, reason)
    shutil.rmtree(folder() / key, ignore_errors=True)


def store(key: str, entry: Entry) -> None:
    """Keep an entry, and remove those used longest ago where there are too many.

    A folder that can't be written to is only warned of: the graph stands, and training goes on.
    """
    if len(entry.graph) > MAX_ENTRY_BYTES:
        logger.info("this graph isn't cached: its constants take %d MiB", len(entry.graph) // 2**20)
        return
    facts = json.dumps(entry.facts).encode()
    try:
        with tempfile.TemporaryDirectory(dir=folder(), prefix=".new-") as temporary:
            new = Path(temporary) / key
            new.mkdir()
            (new / _GRAPH).write_bytes(entry.graph)
            (new / _FACTS).write_bytes(facts)
            (new / _CHECKSUM).write_text(_checksum(entry.graph, facts))
            shutil.rmtree(folder() / key, ignore_errors=True)
            os.replace(new, folder() / key)
        _trim(key)
    except OSError as error:
        logger.warning("a built graph can't be cached in %s: %s", folder(), error)


def _checksum(graph: bytes, facts: bytes) -> str:
    return hashlib.sha256(
        hashlib.sha256(graph).digest() + hashlib.sha256(facts).digest()
    ).hexdigest()


def _trim(newest: str) -> None:
    entries = []
    for path in folder().iterdir():
        with contextlib.suppress(OSError):  # another process removes it, too
            if path.is_dir() and not path.name.startswith("."):
                size = sum(file.stat().st_size for file in path.iterdir())
                entries.append((path.name == newest, path.stat().st_mtime, size, path))
    total = sum(size for _, _, size, _ in entries)
    for _, _, size, path in sorted(entries)[:-1]:
        if total <= MAX_BYTES:
            break
        shutil.rmtree(path, ignore_errors=True)
        total -= size
